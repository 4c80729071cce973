"""``errata submit``, ``import``, ``list``, ``status``, ``retract``, ``approve``, ``release``."""

import sys
from io import BufferedIOBase
from pathlib import Path
from typing import Annotated, cast

import typer

from service.cli.options import Home, Json, Limit, Timeout, Url, connect, print_json
from service.client import ErrataClient
from service.console import Follow, make_console, one_line, table
from service.schemas import Edit, EditState, EditStatus

EditId = Annotated[str, typer.Argument(metavar="ID", help="The edit's id: edit_…", show_default=False)]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until it is at rest; exit 1 unless it is live or retracted")]
_PANEL = "Edits"
_WAIT_S = 1800.0
_ARRIVED = frozenset({EditStatus.LIVE, EditStatus.RETRACTED})


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("submit", rich_help_panel=_PANEL)(submit)
    app.command("import", rich_help_panel=_PANEL)(import_)
    app.command("list", rich_help_panel=_PANEL)(list_)
    app.command("status", rich_help_panel=_PANEL)(status)
    app.command("retract", rich_help_panel=_PANEL)(retract)
    app.command("approve", rich_help_panel=_PANEL)(approve)
    app.command("release", rich_help_panel=_PANEL)(release)


def submit(  # noqa: PLR0913, PLR0917  a command's options
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the model is asked", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="What it must answer", show_default=False)],
    rephrase: Annotated[
        list[str] | None, typer.Option("--rephrase", help="Another wording, only measured; may be repeated")
    ] = None,
    paraphrase: Annotated[
        list[str] | None, typer.Option("--paraphrase", help="Another wording, trained on too; may be repeated")
    ] = None,
    wait: Wait = False,
    timeout: Timeout = _WAIT_S,
    home: Home = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Store a correction; it is trained and served by itself."""
    with connect(home, url) as client:
        edit = client.submit(prompt, target, rephrases=rephrase or [], paraphrases=paraphrase or [])
        if wait:
            _wait(client, edit.id, timeout, as_json=as_json)
        else:
            _show(edit, as_json=as_json)


def import_(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="One JSON object a line; - is standard input", show_default=False)
    ],
    home: Home = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Store corrections from a file of JSON lines; valid lines are kept. Exit 1 if a line was refused."""
    source = _source(file)
    with connect(home, url) as client:
        report = client.import_edits(source)
    if as_json:
        print_json(report)
    else:
        typer.echo(f"{report.accepted} stored, {report.rejected} refused")
        for error in report.errors:
            typer.echo(f"line {error.line}: {error.message} ({error.code})", err=True)
    raise typer.Exit(1 if report.rejected else 0)


def list_(
    status: Annotated[EditStatus | None, typer.Option("--status", help="Only edits in this status")] = None,
    q: Annotated[str | None, typer.Option("--q", metavar="TEXT", help="Only edits with this text")] = None,
    after: Annotated[str | None, typer.Option("--after", metavar="ID", help="Go on behind this edit")] = None,
    limit: Limit = 50,
    home: Home = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List edits, newest first."""
    with connect(home, url) as client:
        page = client.edits(status=status, q=q, after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    rows = [(edit.id, edit.status, edit.version, edit.prompt, edit.target) for edit in page.data]
    make_console().print(table(("ID", "STATUS", "VERSION", "PROMPT", "TARGET"), rows, fixed=3))
    if page.has_more:
        typer.echo(f"more: --after {page.data[-1].id}", err=True)


def status(
    edit_id: EditId,
    wait: Wait = False,
    timeout: Timeout = _WAIT_S,
    home: Home = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Show where an edit is in its life, and what the model said before and after."""
    with connect(home, url) as client:
        if wait:
            _wait(client, edit_id, timeout, as_json=as_json)
        else:
            _show_state(client.status(edit_id), as_json=as_json)


def retract(edit_id: EditId, home: Home = None, url: Url = None, as_json: Json = False) -> None:
    """Take an edit back: a version without it is trained and served."""
    with connect(home, url) as client:
        _show(client.retract(edit_id), as_json=as_json)


def approve(edit_id: EditId, home: Home = None, url: Url = None, as_json: Json = False) -> None:
    """Let an edit that another key proposed be trained."""
    with connect(home, url) as client:
        _show(client.approve(edit_id), as_json=as_json)


def release(edit_id: EditId, home: Home = None, url: Url = None, as_json: Json = False) -> None:
    """Let an edit that a rollback held be trained again."""
    with connect(home, url) as client:
        _show(client.release(edit_id), as_json=as_json)


def _source(file: Path) -> BufferedIOBase | Path:
    if str(file) == "-":
        return cast(BufferedIOBase, sys.stdin.buffer)
    if not file.is_file():
        raise typer.BadParameter(f"there is no file {file}", param_hint="FILE")
    return file


def _wait(client: ErrataClient, edit_id: str, timeout_s: float, *, as_json: bool) -> None:
    with Follow(make_console(stderr=True)) as follow:
        state = client.wait([edit_id], timeout_s=timeout_s, on_change=follow)[edit_id]
    _show_state(state, as_json=as_json)
    raise typer.Exit(0 if state.status in _ARRIVED else 1)


def _show(edit: Edit, *, as_json: bool) -> None:
    if as_json:
        print_json(edit)
    else:
        typer.echo(f"{edit.id}  {edit.status}")


def _show_state(state: EditState, *, as_json: bool) -> None:
    if as_json:
        print_json(state)
        return
    version = "" if state.version is None else f"  version {state.version}"
    typer.echo(f"{state.id}  {state.status}{version}")
    if state.progress:
        typer.echo(f"  {state.progress.run}: {state.progress.phase}, {state.progress.elapsed_s:.0f} s")
    for form, outcome in state.verified.items():
        before = "" if outcome.before is None else f"{one_line(outcome.before)!r} -> "
        typer.echo(f"  {form}: {before}{one_line(outcome.after)!r}{'' if outcome.matched else '  (not the target)'}")
    if state.error:
        typer.echo(f"  {state.error.message} ({state.error.code})")
