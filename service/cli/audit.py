"""``errata audit``."""

import time
from typing import Annotated

import typer

from service.cli.options import Home, Json, Limit, Url, connect, print_json
from service.console import ago, make_console, table
from service.schemas import AuditEntry


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("audit", rich_help_panel="Access")(audit)


def audit(
    after: Annotated[str | None, typer.Option("--after", metavar="ID", help="Go on behind this entry")] = None,
    limit: Limit = 20,
    home: Home = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """List who changed what the model says, newest first."""
    with connect(home, url) as client:
        page = client.audit(after=after, limit=limit)
    if as_json:
        print_json(page)
        return
    now = time.time()
    rows = [
        (
            entry.id,
            ago(now - entry.created_at),
            entry.action,
            entry.version,
            entry.actor_name or entry.actor,
            _what(entry),
        )
        for entry in page.data
    ]
    make_console().print(table(("ID", "AGE", "ACTION", "ACTIVE", "ACTOR", "WHAT"), rows, fixed=5))
    if page.has_more:
        typer.echo(f"more: --after {page.data[-1].id}", err=True)


def _what(entry: AuditEntry) -> str:
    if ids := entry.data.get("ids"):
        return f"{ids[0]} and {len(ids) - 1} more" if len(ids) > 1 else str(ids[0])
    if "previous" in entry.data:
        return f"{entry.data['previous']} -> {entry.data['version']}" + (f" by {entry.run}" if entry.run else "")
    return str(entry.data.get("id", ""))
