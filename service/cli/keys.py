"""``errata keys create``, ``list``, ``revoke``: against the stack's Redis itself, where the first key comes from."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from redis.exceptions import RedisError

from service.api_keys import MAX_RATE, ApiKey, KeyStore, Scope
from service.audit import Actor, acting
from service.cli.options import Home, Json, print_json, read_settings
from service.console import ago, make_console, table
from service.errors import UnavailableError
from service.stack import Stack
from service.stores import Stores

_DAY_S = 86400


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    group = typer.Typer(no_args_is_help=True, help="API keys; needs ERRATA_REDIS_URL or the running stack.")
    group.command("create")(create)
    group.command("list")(list_)
    group.command("revoke")(revoke)
    app.add_typer(group, name="keys", rich_help_panel="Access")


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who or what uses it", show_default=False)],
    scope: Annotated[list[Scope], typer.Option("--scope", help="What it opens; may be repeated", show_default=False)],
    expires_days: Annotated[
        int | None, typer.Option("--expires-days", min=1, max=36500, metavar="N", help="Default: it does not expire")
    ] = None,
    rate: Annotated[
        int | None, typer.Option("--rate", min=1, max=MAX_RATE, metavar="N", help="Most requests per minute")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it, this once: what is kept of it does not give it back."""
    expires_at = None if expires_days is None else int(time.time()) + expires_days * _DAY_S
    with _store(home) as store:
        made = store.create(name, scope, expires_at=expires_at, rate=rate)
    if as_json:
        print_json(made)
        return
    typer.echo(made.key)
    typer.echo(f"{made.id} opens {', '.join(made.scopes)}; it is not shown again", err=True)


def list_(home: Home = None, as_json: Json = False) -> None:
    """List all keys, newest first, the revoked and the expired too."""
    with _store(home) as store:
        found = store.all()
    if as_json:
        typer.echo(json.dumps([key.model_dump(mode="json") for key in found], indent=2))
        return
    now = time.time()
    rows = [
        (
            key.id,
            _state(key, now),
            ",".join(key.scopes),
            key.rate,
            ago(now - key.created_at),
            "never" if key.last_used_at is None else ago(now - key.last_used_at),
            key.name,
        )
        for key in found
    ]
    make_console().print(table(("ID", "STATE", "SCOPES", "RATE", "AGE", "UNUSED FOR", "NAME"), rows, fixed=6))


def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id: key_…", show_default=False)],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Take a key back for good; every service refuses it within five seconds."""
    with _store(home) as store:
        revoked = store.revoke(key_id)
    if as_json:
        print_json(revoked)
    else:
        typer.echo(f"{revoked.id} is revoked")


def _state(key: ApiKey, now: float) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is None:
        return "usable"
    return f"usable {ago(key.expires_at - now)} more" if key.usable(now) else "expired"


@contextmanager
def _store(home: Path | None) -> Iterator[KeyStore]:
    settings = read_settings(home)
    if not settings.redis_url:
        settings = Stack(settings).settings()
    stores = Stores.connect(settings)
    try:
        with acting(Actor("cli")):
            yield stores.keys
    except RedisError as error:
        raise UnavailableError(f"Redis does not answer: {error}", code="redis_unavailable") from error
    finally:
        stores.redis.close()
