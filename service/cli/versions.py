"""``errata versions``, ``activate``, ``rollback``."""

import time
from typing import Annotated

import typer

from service.cli.options import Home, Json, Limit, Url, connect, print_json
from service.console import ago, make_console, table
from service.schemas import Activation

_PANEL = "Versions and runs"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("versions", rich_help_panel=_PANEL)(versions)
    app.command("activate", rich_help_panel=_PANEL)(activate)
    app.command("rollback", rich_help_panel=_PANEL)(rollback)


def versions(limit: Limit = 20, home: Home = None, url: Url = None, as_json: Json = False) -> None:
    """List versions, newest first; * is the active one, a canary gets a part of its traffic."""
    with connect(home, url) as client:
        page = client.versions(limit=limit)
    if as_json:
        print_json(page)
        return
    now = time.time()
    rows = [
        (
            f"{found.version}{' *' if found.active else ''}",
            "canary" if found.canary else found.state,
            found.edits.count,
            f"+{found.edits.added} -{found.edits.removed}",
            ago(now - found.created_at),
            found.reason,
        )
        for found in page.data
    ]
    make_console().print(table(("VERSION", "STATE", "EDITS", "CHANGE", "AGE", "REASON"), rows, fixed=5))


def activate(
    version: Annotated[int, typer.Argument(min=0, metavar="N", help="The version's number", show_default=False)],
    expected_active: Annotated[
        int | None, typer.Option("--expected-active", min=0, metavar="N", help="Refuse unless this one is active now")
    ] = None,
    home: Home = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Make a version the one that `errata` means."""
    with connect(home, url) as client:
        _show(client.activate(version, expected_active=expected_active), as_json=as_json)


def rollback(
    to: Annotated[int | None, typer.Option("--to", min=0, metavar="N", help="Default: the one active before")] = None,
    home: Home = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Go back to an older version; edits that it lacks are held."""
    with connect(home, url) as client:
        _show(client.rollback(to), as_json=as_json)


def _show(activation: Activation, *, as_json: bool) -> None:
    if as_json:
        print_json(activation)
        return
    before = "" if activation.previous is None else f" (before: {activation.previous})"
    typer.echo(f"version {activation.active} is active{before}")
