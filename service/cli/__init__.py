"""The ``errata`` command."""

from typer import Typer

from service.cli import audit, edits, keys, model, runs, stack, versions
from service.cli.errors import Commands

app = Typer(
    name="errata",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Corrections for a running language model: stored, trained, verified, served, and taken back.",
    epilog="A command finds the stack that runs under --home (or ERRATA_HOME); --url names any other service.",
)
for _group in (stack, edits, versions, runs, keys, audit, model):
    _group.register(app)

__all__ = ["app"]
