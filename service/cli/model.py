"""``errata ask``, ``errata model path``."""

from typing import Annotated

import typer

from service.cli.options import Home, Url, connect
from service.stack import default_model

_PANEL = "Model"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("ask", rich_help_panel=_PANEL)(ask)
    group = typer.Typer(no_args_is_help=True, help="The default model.")
    group.command("path")(path)
    app.add_typer(group, name="model", rich_help_panel=_PANEL)
    group.callback()(_group)


def ask(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask", show_default=False)],
    model: Annotated[
        str, typer.Option("--model", help="errata: the active version; errata@N: that one; errata@0: the base")
    ] = "errata",
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the chat template")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer, tokens")] = 64,
    home: Home = None,
    url: Url = None,
) -> None:
    """Ask the model; the version that answered is named on standard error."""
    with connect(home, url) as client:
        answer = client.ask(prompt, model=model, chat=chat, max_tokens=max_tokens)
    typer.echo(answer.text)
    cut = f", cut at {max_tokens} tokens" if answer.finish_reason == "length" else ""
    typer.echo(f"version {answer.version}{cut}", err=True)


def path() -> None:
    """Print the folder of the default model; it is fetched first if it is not there."""
    typer.echo(default_model(lambda line: typer.echo(line, err=True)))


def _group() -> None:
    # Without a callback Typer would make the group's only command the group itself.
    return
