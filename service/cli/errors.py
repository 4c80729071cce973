"""Expected failures: one line on standard error, exit status 1. Anything else is a defect and shows its traceback."""

from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from service.client import ApiError, ClientError
from service.console import one_line
from service.errors import ErrataError


class SettingsError(ErrataError):
    """The environment is not what the settings allow."""


class Commands(TyperGroup):
    """The group of all commands."""

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        try:
            return super().invoke(ctx)
        except ClientError as error:
            _fail(_named(error), error)
        except BrokenPipeError:
            # `errata logs | head`: Typer ends it quietly.
            raise
        except (ErrataError, OSError) as error:
            _fail(str(error), error)


def settings_error(error: ValueError) -> SettingsError:
    """The first thing that is wrong with the environment, with the variable's name."""
    if not isinstance(error, ValidationError):
        return SettingsError(str(error))
    first = error.errors(include_input=False, include_url=False)[0]
    name = "ERRATA_" + ".".join(str(part) for part in first["loc"]).upper() if first["loc"] else "settings"
    return SettingsError(f"{name}: {first['msg']}")


def _named(error: ClientError) -> str:
    if not isinstance(error, ApiError):
        return error.message
    where = f"{error.param}: " if error.param and not error.message.startswith(error.param) else ""
    request = f", request {error.request_id}" if error.request_id and error.status >= 500 else ""
    return f"{where}{error.message} ({error.code}{request})"


def _fail(message: str, cause: BaseException) -> None:
    typer.echo(f"errata: {one_line(message)}", err=True)
    raise typer.Exit(1) from cause
