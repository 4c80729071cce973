"""Every request of the SDK as a value: built once here, sent by either client. Nothing here does I/O."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from service.client.errors import ApiError, ClientError
from service.model_names import MIN_VERSION_HEADER, VERSION_HEADER
from service.schemas import (
    Activation,
    AuditEntry,
    Edit,
    EditDetail,
    EditRequest,
    EditState,
    EditStatus,
    Health,
    ImportReport,
    Page,
    Run,
    Version,
    VersionDiff,
)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

ImportSource = Iterable[EditRequest] | BufferedIOBase | Path
_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and how to read its answer.

    Attributes:
        parse: reads an answer that is a success.
        body: streamed as NDJSON; ``json`` is the ordinary body.
        answers: statuses besides 2xx whose body ``parse`` reads.
        wait_s: seconds that the service may take on purpose, beside the client's timeout.
    """

    method: str
    path: str
    parse: Callable[[httpx.Response], T]
    params: Mapping[str, str | int | float] = field(default_factory=dict)
    json: Any = None
    body: Iterable[bytes] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    answers: frozenset[int] = frozenset()
    wait_s: float = 0.0

    def result(self, response: httpx.Response) -> T:
        """The answer's content.

        Raises:
            ApiError: the service answered with an error.
            ClientError: the answer is not what this SDK understands.
        """
        if not response.is_success and response.status_code not in self.answers:
            raise ApiError.of(response)
        try:
            return self.parse(response)
        except (ValidationError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ClientError(
                f"{self.method} {response.url} did not answer as this SDK expects: is it Errata, of this version?"
            ) from error


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer without surrounding white space.
        version: the number of the version that answered.
        finish_reason: ``stop`` if the model ended by itself, ``length`` if it was cut.
    """

    text: str
    version: int
    finish_reason: str


def submit(
    prompt: str,
    target: str,
    *,
    rephrases: Sequence[str],
    paraphrases: Sequence[str],
    metadata: Mapping[str, str] | None,
    idempotency_key: str | None,
) -> Call[Edit]:
    """``POST /edits``."""
    body = {
        "prompt": prompt,
        "target": target,
        "rephrases": list(rephrases),
        "paraphrases": list(paraphrases),
        "metadata": dict(metadata or {}),
    }
    return Call("POST", "/edits", _model(Edit), json=body, headers=_once(idempotency_key))


def submit_batch(edits: Iterable[EditRequest], idempotency_key: str | None) -> Call[list[Edit]]:
    """``POST /edits/batch``."""
    body = {"edits": [edit.model_dump() for edit in edits]}
    return Call("POST", "/edits/batch", _data(Page[Edit]), json=body, headers=_once(idempotency_key))


def import_edits(source: ImportSource, idempotency_key: str | None) -> Call[ImportReport]:
    """``POST /edits/import``."""
    headers = {"Content-Type": "application/x-ndjson", **_once(idempotency_key)}
    return Call("POST", "/edits/import", _model(ImportReport), body=_ndjson(source), headers=headers)


def edits(status: EditStatus | None, q: str | None, after: str | None, limit: int) -> Call[Page[Edit]]:
    """``GET /edits``."""
    return Call("GET", "/edits", _model(Page[Edit]), params=_given(status=status, q=q, after=after, limit=limit))


def edit(edit_id: str) -> Call[EditDetail]:
    """``GET /edits/{id}``."""
    return Call("GET", f"/edits/{_segment(edit_id)}", _model(EditDetail))


def status(edit_id: str, wait_s: float) -> Call[EditState]:
    """``GET /edits/{id}/status``."""
    path = f"/edits/{_segment(edit_id)}/status"
    return Call("GET", path, _model(EditState), params={"wait": wait_s}, wait_s=wait_s)


def retract(edit_id: str) -> Call[Edit]:
    """``DELETE /edits/{id}``."""
    return Call("DELETE", f"/edits/{_segment(edit_id)}", _model(Edit))


def approve(edit_id: str) -> Call[Edit]:
    """``POST /edits/{id}/approve``."""
    return Call("POST", f"/edits/{_segment(edit_id)}/approve", _model(Edit))


def release(edit_id: str) -> Call[Edit]:
    """``POST /edits/{id}/release``."""
    return Call("POST", f"/edits/{_segment(edit_id)}/release", _model(Edit))


def versions(after: int | None, limit: int) -> Call[Page[Version]]:
    """``GET /versions``."""
    return Call("GET", "/versions", _model(Page[Version]), params=_given(after=after, limit=limit))


def version(number: int) -> Call[Version]:
    """``GET /versions/{n}``."""
    return Call("GET", f"/versions/{number}", _model(Version))


def diff(number: int, other: int) -> Call[VersionDiff]:
    """``GET /versions/{n}/diff/{m}``."""
    return Call("GET", f"/versions/{number}/diff/{other}", _model(VersionDiff))


def activate(number: int, expected_active: int | None) -> Call[Activation]:
    """``POST /versions/{n}/activate``."""
    body = _given(expected_active=expected_active)
    return Call("POST", f"/versions/{number}/activate", _model(Activation), json=body)


def rollback(to: int | None) -> Call[Activation]:
    """``POST /rollback``."""
    return Call("POST", "/rollback", _model(Activation), json=_given(to=to))


def runs(after: str | None, limit: int) -> Call[Page[Run]]:
    """``GET /runs``."""
    return Call("GET", "/runs", _model(Page[Run]), params=_given(after=after, limit=limit))


def run(run_id: str) -> Call[Run]:
    """``GET /runs/{id}``."""
    return Call("GET", f"/runs/{_segment(run_id)}", _model(Run))


def start_run() -> Call[Run]:
    """``POST /runs``."""
    return Call("POST", "/runs", _model(Run))


def cancel_run(run_id: str) -> Call[Run]:
    """``POST /runs/{id}/cancel``."""
    return Call("POST", f"/runs/{_segment(run_id)}/cancel", _model(Run))


def audit(after: str | None, limit: int) -> Call[Page[AuditEntry]]:
    """``GET /audit``."""
    return Call("GET", "/audit", _model(Page[AuditEntry]), params=_given(after=after, limit=limit))


def health() -> Call[Health]:
    """``GET /health/ready``; that it is not ready is an answer too."""
    return Call("GET", "/health/ready", _model(Health), answers=frozenset({503}))


def ask(prompt: str, model: str, *, chat: bool, max_tokens: int, min_version: int | None) -> Call[Answer]:
    """``POST /v1/completions`` or ``/v1/chat/completions``, greedily."""
    body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": max_tokens}
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    headers = {} if min_version is None else {MIN_VERSION_HEADER: str(min_version)}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return Call("POST", path, _chat_answer if chat else _raw_answer, json=body, headers=headers)


def _raw_answer(response: httpx.Response) -> Answer:
    choice = response.json()["choices"][0]
    return _answer(response, choice["text"], choice)


def _chat_answer(response: httpx.Response) -> Answer:
    choice = response.json()["choices"][0]
    return _answer(response, choice["message"]["content"], choice)


def _answer(response: httpx.Response, text: str | None, choice: Mapping[str, Any]) -> Answer:
    return Answer((text or "").strip(), int(response.headers[VERSION_HEADER]), str(choice["finish_reason"]))


def _model(model: type[M]) -> Callable[[httpx.Response], M]:
    return lambda response: model.model_validate_json(response.content)


def _data(model: type[Page[T]]) -> Callable[[httpx.Response], list[T]]:
    return lambda response: model.model_validate_json(response.content).data


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _once(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Idempotency-Key": key}


def _segment(text: str) -> str:
    # "." and ".." survive quoting and would name another route.
    if text in {"", ".", ".."}:
        raise ClientError(f"{text!r} is no id")
    return quote(text, safe="")


def _ndjson(source: ImportSource) -> Iterator[bytes]:
    if isinstance(source, Path):
        with source.open("rb") as file:
            yield from _chunks(file)
    elif isinstance(source, BufferedIOBase):
        yield from _chunks(source)
    else:
        for request in source:
            yield request.model_dump_json().encode() + b"\n"


def _chunks(file: BufferedIOBase) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk
