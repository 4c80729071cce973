"""What the repository has from the code: ``openapi/openapi.json``, the README's table of settings, that of the metrics.

``python -m service.generate`` writes them, in the repository's root; ``--check`` only says whether they are up to date.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from service.app import create_app
from service.metrics.catalogue import table as metrics_table
from service.settings import Settings

OPENAPI = Path("openapi/openapi.json")
README = Path("README.md")
OBSERVABILITY = Path("docs/observability.md")


class MissingMarkersError(Exception):
    """The file has no place for the table."""


def openapi_document() -> str:
    """The service's OpenAPI document, as it is kept in the repository."""
    return json.dumps(create_app(Settings()).openapi(), indent=2, ensure_ascii=False) + "\n"


def settings_table() -> str:
    """Every setting as a row of Markdown: variable, default, meaning."""
    rows = [
        f"| `ERRATA_{name.upper()}` | {_default(field)} | {_meaning(field)} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | default | meaning |", "|---|---|---|", *rows])


def with_settings(readme: str) -> str:
    """The README with the table of settings between its markers.

    Raises:
        MissingMarkersError: it does not have each of them once, in order.
    """
    return _between(readme, "settings", settings_table(), README)


def with_metrics(text: str) -> str:
    """docs/observability.md with the table of metrics between its markers.

    Raises:
        MissingMarkersError: it does not have each of them once, in order.
    """
    return _between(text, "metrics", metrics_table(), OBSERVABILITY)


def _between(text: str, name: str, table: str, path: Path) -> str:
    begin_mark, end_mark = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, begin, rest = text.partition(begin_mark)
    _, end, tail = rest.partition(end_mark)
    if not (begin and end) or text.count(begin_mark) != 1 or text.count(end_mark) != 1:
        raise MissingMarkersError(f"{path} needs one line {begin_mark} and one line {end_mark} behind it")
    return f"{head}{begin_mark}\n{table}\n{end_mark}{tail}"


def generated(root: Path) -> Mapping[Path, str]:
    """What each generated file must hold.

    Raises:
        MissingMarkersError: a file has no place for its table.
    """
    return {
        root / OPENAPI: openapi_document(),
        root / README: with_settings((root / README).read_text(encoding="utf-8")),
        root / OBSERVABILITY: with_metrics((root / OBSERVABILITY).read_text(encoding="utf-8")),
    }


def main(arguments: list[str], *, root: Path) -> int:
    """Writes the files, or with ``--check`` compares them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m service.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is out of date")
    check = parser.parse_args(arguments).check
    try:
        contents = generated(root)
    except MissingMarkersError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    stale = [path for path, content in contents.items() if not path.is_file() or path.read_text("utf-8") != content]
    for path in stale:
        if check:
            sys.stderr.write(f"{path.relative_to(root)} is out of date; run `make generated`\n")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(contents[path], encoding="utf-8")
    return int(check and bool(stale))


def _default(field: FieldInfo) -> str:
    value: Any = field.default
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value in ("", (), None):
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


def _meaning(field: FieldInfo) -> str:
    text = (field.description or "").replace("|", "\\|")
    return text + (f" ({choices})" if (choices := _choices(field.annotation)) else "")


def _choices(annotation: Any) -> str:
    values: list[Any] = []
    if get_origin(annotation) is Literal:
        values = [value for value in get_args(annotation) if value]
    elif isinstance(annotation, type) and issubclass(annotation, Enum):
        values = [member.value for member in annotation]
    return ", ".join(f"`{value}`" for value in values)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], root=Path.cwd()))
