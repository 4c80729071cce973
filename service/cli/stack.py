"""``errata up``, ``down``, ``ps``, ``logs``, ``doctor``, ``demo``."""

import dataclasses
import json
import signal
from typing import Annotated, Any

import typer

from service import doctor as examination
from service.cli.logs import follow, last_lines
from service.cli.options import Home, Json, Url, read_settings
from service.console import ago, make_console, table
from service.demo import run_demo
from service.doctor import Level
from service.errors import NotFoundError
from service.stack import Stack

_PANEL = "Stack"
_MARKS = {Level.OK: "ok  ", Level.WARN: "warn", Level.FAIL: "FAIL"}


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("up", rich_help_panel=_PANEL)(up)
    app.command("down", rich_help_panel=_PANEL)(down)
    app.command("ps", rich_help_panel=_PANEL)(ps)
    app.command("logs", rich_help_panel=_PANEL)(logs)
    app.command("doctor", rich_help_panel=_PANEL)(doctor)
    app.command("demo", rich_help_panel=_PANEL)(demo)


def up(
    home: Home = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; default: ERRATA_HOST")] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="0 takes a free one; default: ERRATA_PORT")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once it is ready")] = False,
) -> None:
    """Start everything on this machine: Redis, service, workers, node."""
    given: dict[str, Any] = {"host": host, "port": port}
    settings = read_settings(home).model_copy(
        update={name: value for name, value in given.items() if value is not None}
    )
    raise typer.Exit(Stack(settings).up(detach=detach, say=typer.echo))


def down(home: Home = None) -> None:
    """Stop everything that `up` started."""
    Stack(read_settings(home)).down(say=typer.echo)


def ps(home: Home = None, as_json: Json = False) -> None:
    """Show the stack's processes. Exit 1 if none runs."""
    processes = Stack(read_settings(home)).processes()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(process) for process in processes], indent=2))
    elif processes:
        rows = [
            (process.name, process.state, process.pid or "", ago(process.uptime_s), process.description)
            for process in processes
        ]
        make_console().print(table(("NAME", "STATE", "PID", "UP", "DESCRIPTION"), rows, fixed=4))
    else:
        typer.echo("nothing runs", err=True)
    raise typer.Exit(0 if processes else 1)


def logs(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A process; default: all")] = None,
    following: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines of each log")] = 50,
    home: Home = None,
) -> None:
    """Print what the processes wrote."""
    settings = read_settings(home)
    files = Stack(settings).log_files()
    if not files:
        raise NotFoundError(f"there are no logs under {settings.home}")
    if name is not None:
        if name not in files:
            raise NotFoundError(f"no log of {name!r}; there are: {', '.join(files)}")
        files = {name: files[name]}
    for source, path in files.items():
        prefix = f"{source}: " if len(files) > 1 else ""
        for line in last_lines(path, lines):
            typer.echo(prefix + line)
    if following:
        for source, line in follow(files):
            typer.echo(f"{source}: {line}" if len(files) > 1 else line)


def doctor(
    home: Home = None,
    url: Url = None,
    as_json: Json = False,
    repairing: Annotated[
        bool, typer.Option("--repair", help="First repair what a crash or the loss of Redis left behind")
    ] = False,
) -> None:
    """Look for what is wrong with the stack, and say what to do. Exit 1 if something is."""
    settings = read_settings(home)
    stack = Stack(settings)
    if stack.running():
        settings, url = stack.settings(), url or stack.url()
    if repairing:
        for sentence in examination.repair(settings):
            typer.echo(sentence, err=as_json)
    findings = examination.examine(settings, url=url)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            typer.echo(f"{_MARKS[finding.level]}  {finding.part}: {finding.found}")
            if finding.advice:
                typer.echo(f"      -> {finding.advice}")
    raise typer.Exit(1 if any(finding.level is Level.FAIL for finding in findings) else 0)


def demo(home: Home = None) -> None:
    """Show it all on 20 real corrections: before, after, rolled back, again. Exit 0 only if every claim held."""
    # SIGTERM too must leave nothing running behind it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise typer.Exit(run_demo(read_settings(home), make_console()))
