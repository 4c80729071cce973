"""Edits from files, as the data sets are published and as Errata writes its own.

Takes a path and returns a list. A file is one JSON list or JSON lines; its first row decides whose fields it is in.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from service.schemas import MAX_REPHRASES, Text, check_untrained, normalise_text
from worker.wordings import untrained_rephrases

T = TypeVar("T")

log = logging.getLogger(__name__)


class EditFileError(ValueError):
    """An edit file that cannot be read; names the file, and the row and field if it is one's fault.

    Rows are counted from 1; in JSON lines, a row's number is its line's.
    """


@dataclass(frozen=True)
class EditRow:
    """One edit of a file. `rephrases` are for evaluation only, `paraphrases` for training only.

    `id` is the file's name without suffix, a colon, and the row's number.
    """

    id: str
    prompt: str
    target: str
    rephrases: tuple[str, ...] = ()
    paraphrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Published:
    """A data set's names for what Errata calls prompt, target and rephrases. Its other fields are not read."""

    name: str
    prompt: str
    target: str
    rephrase: str


# WikiBigEdit's `personas` and `mhop` are what it measures portability by: neither is a rephrase.
_PUBLISHED = (
    _Published("ZsRE", "src", "alt", "rephrase"),
    _Published("CounterFact", "prompt", "target_new", "rephrase_prompt"),
    _Published("WikiBigEdit", "update", "ans", "rephrase"),
)
_OWN_FIELDS = frozenset({"prompt", "target", "rephrases", "paraphrases", "metadata"})

_text: TypeAdapter[str] = TypeAdapter(Text)
_texts: TypeAdapter[tuple[str, ...]] = TypeAdapter(Annotated[tuple[Text, ...], Field(max_length=MAX_REPHRASES)])


def read_edits(path: Path, limit: int | None = None) -> list[EditRow]:
    """Read the edits of `path`, texts stripped, in the order of the rows: of its first `limit` rows, or of all.

    A later row supersedes an earlier one of the same prompt, compared as the service compares prompts. A rephrase that
    a row trains on is left out, and how many were is logged.

    Raises:
        EditFileError: the file is not JSON, is in no known fields, or has a bad row.
        OSError: it cannot be opened.
    """
    rows = list(itertools.islice(_rows(path), limit))
    if not rows:
        raise EditFileError(f"{path} holds no edits")
    read = _reader(path, *rows[0])
    edits: dict[str, EditRow] = {}
    for number, row in rows:
        edit = read(_Row(path, number, row))
        question = normalise_text(edit.prompt)
        edits.pop(question, None)
        edits[question] = edit
    return _without_trained(path, list(edits.values()))


def _without_trained(path: Path, edits: Sequence[EditRow]) -> list[EditRow]:
    """The edits without rephrases that one of them trains on: they would measure what was learned by heart."""
    left = zip(edits, untrained_rephrases(edits), strict=True)
    kept = [dataclasses.replace(edit, rephrases=rephrases) for edit, rephrases in left]
    dropped = sum(len(edit.rephrases) for edit in edits) - sum(len(edit.rephrases) for edit in kept)
    if dropped:
        log.warning("edits.trained_rephrases_left_out", extra={"path": str(path), "rephrases": dropped})
    return kept


@dataclass(frozen=True)
class _Row:
    path: Path
    number: int
    fields: Mapping[str, Any]

    @property
    def id(self) -> str:
        return f"{self.path.stem}:{self.number}"

    def text(self, field: str) -> str:
        if field not in self.fields:
            raise self.error(f"field {field!r} is missing")
        return self._validated(_text, field)

    def optional_text(self, field: str) -> tuple[str, ...]:
        return () if self.fields.get(field) is None else (self.text(field),)

    def texts(self, field: str) -> tuple[str, ...]:
        return self._validated(_texts, field) if field in self.fields else ()

    def error(self, reason: str) -> EditFileError:
        return EditFileError(f"{self.path}: row {self.number}: {reason}")

    def _validated(self, adapter: TypeAdapter[T], field: str) -> T:
        try:
            return adapter.validate_python(self.fields[field])
        except ValidationError as error:
            first = error.errors()[0]
            place = "".join(f"[{index}]" for index in first["loc"])
            raise self.error(f"field {field + place!r}: {first['msg']}") from error


def _reader(path: Path, number: int, first: Mapping[str, Any]) -> Callable[[_Row], EditRow]:
    for published in _PUBLISHED:
        if published.prompt in first and published.target in first:
            return lambda row: _published_edit(row, published)
    if "prompt" in first and "target" in first:
        return _own_edit
    schemas = [f"{schema.name} ({schema.prompt}, {schema.target}, {schema.rephrase})" for schema in _PUBLISHED]
    raise EditFileError(
        f"{path}: row {number} has the fields {', '.join(sorted(first)) or 'of an empty object'}; known are "
        f"{', '.join(schemas)} and Errata's own (prompt, target, rephrases, paraphrases, metadata)"
    )


def _published_edit(row: _Row, schema: _Published) -> EditRow:
    return EditRow(row.id, row.text(schema.prompt), row.text(schema.target), row.optional_text(schema.rephrase))


def _own_edit(row: _Row) -> EditRow:
    if unknown := sorted(row.fields.keys() - _OWN_FIELDS):
        raise row.error(f"field {unknown[0]!r} is unknown; known are {', '.join(sorted(_OWN_FIELDS))}")
    edit = EditRow(row.id, row.text("prompt"), row.text("target"), row.texts("rephrases"), row.texts("paraphrases"))
    try:
        check_untrained(edit.rephrases, (edit.prompt, *edit.paraphrases))
    except ValueError as error:
        raise row.error(str(error)) from error
    return edit


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EditFileError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    is_list = text.lstrip().startswith("[")
    for number, row in enumerate(_listed(path, text), 1) if is_list else _lines(path, text):
        if not isinstance(row, dict):
            raise EditFileError(f"{path}: row {number} is no JSON object")
        yield number, row


def _listed(path: Path, text: str) -> Sequence[object]:
    try:
        rows: Sequence[object] = json.loads(text)
    except json.JSONDecodeError as error:
        raise EditFileError(f"{path} is not JSON: {error}") from error
    return rows


def _lines(path: Path, text: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise EditFileError(f"{path}: row {number} is not JSON: {error}") from error
