"""``errata runs``."""

import time

import typer

from service.cli.options import Home, Json, Limit, Url, connect, print_json
from service.console import ago, make_console, table
from service.schemas import Run


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("runs", rich_help_panel="Versions and runs")(runs)


def runs(limit: Limit = 20, home: Home = None, url: Url = None, as_json: Json = False) -> None:
    """List training runs, newest first."""
    with connect(home, url) as client:
        page = client.runs(limit=limit)
    if as_json:
        print_json(page)
        return
    now = time.time()
    rows = [
        (
            run.id,
            run.status,
            run.version,
            run.edits,
            f"{run.epochs[-1].loss:.3f}" if run.epochs else "",
            ago(_seconds(run, now)),
            ago(now - run.created_at),
            run.error.message if run.error else run.phase,
        )
        for run in page.data
    ]
    columns = ("ID", "STATUS", "VERSION", "EDITS", "LOSS", "TOOK", "AGE", "PHASE OR ERROR")
    make_console().print(table(columns, rows, fixed=7))


def _seconds(run: Run, now: float) -> float:
    return 0.0 if run.started_at is None else (run.finished_at or now) - run.started_at
