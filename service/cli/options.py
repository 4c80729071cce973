"""Options that several commands have, and what they lead to: settings, a stack, a client."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from service.cli.errors import settings_error
from service.client import ErrataClient
from service.settings import Settings
from service.stack import Stack

Home = Annotated[
    Path | None, typer.Option("--home", metavar="DIR", help="State of the stack; default: ERRATA_HOME, or .errata")
]
Url = Annotated[
    str | None, typer.Option("--url", metavar="URL", help="Address of a service; default: the stack under --home")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="Most entries to show")]
Timeout = Annotated[float, typer.Option("--timeout", min=0, metavar="SECONDS", help="Longest time to wait")]


def read_settings(home: Path | None) -> Settings:
    """The environment's settings, with another home if one is given.

    Raises:
        SettingsError: a variable is unknown or wrong.
    """
    try:
        settings = Settings.from_env()
    except ValueError as error:
        raise settings_error(error) from error
    return settings if home is None else settings.model_copy(update={"home": home})


def connect(home: Path | None, url: str | None) -> ErrataClient:
    """A client of the service at ``url``, or of the stack that runs under ``home``.

    Raises:
        ErrataError: no address is given and no stack runs.
    """
    settings = read_settings(home)
    if not url:
        stack = Stack(settings)
        url, kept = stack.url(), stack.settings()
        settings = settings if settings.api_key.get_secret_value() else kept
    return ErrataClient(url, api_key=settings.api_key.get_secret_value() or None)


def print_json(answer: BaseModel) -> None:
    """Prints an answer as the API gave it."""
    typer.echo(answer.model_dump_json(indent=2))
