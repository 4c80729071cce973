"""An import's body: cut into lines and chunks on the event loop, checked and stored chunk by chunk in threads."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from service.api.dependencies import Parts
from service.api.errors import validation_error
from service.errors import BusyError, ErrataError, InvalidRequestError
from service.schemas import EditRequest, ImportLineError, ImportReport
from service.store import Idempotency

IMPORT_PATH = "/edits/import"
_CHUNK_LINES = 200
_CHUNK_BYTES = 1024 * 1024
_MAX_ERRORS = 1_000

Line = tuple[int, bytes | InvalidRequestError]
"""A line's number from 1, and its content, or the error that it is too long."""


@dataclass(frozen=True)
class Chunk:
    """Lines that are stored at once; ``last`` if the body ends with them."""

    lines: Sequence[Line]
    last: bool


async def chunks(body: AsyncIterator[bytes], *, line_max_bytes: int) -> AsyncIterator[Chunk]:
    """Cuts a body into chunks of whole lines, alike however it came in pieces; the last chunk may be empty.

    Args:
        body: the pieces.
        line_max_bytes: the longest line.
    """
    lines: list[Line] = []
    size_bytes = 0
    async for number, line in _lines(body, line_max_bytes):
        # Not as soon as it is full: the body may end there.
        if len(lines) == _CHUNK_LINES or size_bytes >= _CHUNK_BYTES:
            yield Chunk(lines, last=False)
            lines, size_bytes = [], 0
        lines.append((number, line))
        size_bytes += len(line) if isinstance(line, bytes) else 0
    yield Chunk(lines, last=True)


class Import:
    """One import: stores its chunks in their order, each in a thread, and reports of all of them.

    Args:
        parts: the service's parts.
        key: the client's idempotency key. Each chunk is stored under the key and its own number, so the same body
            finds what was stored of it, and another one is refused where it differs.
    """

    def __init__(self, parts: Parts, key: str | None) -> None:
        self._checker = parts.checker
        self._edits = parts.stores.edits
        self._key = key
        self._chunks = 0
        self._errors: list[ImportLineError] = []
        self._rejected = 0
        self._ids: list[str] = []

    def store(self, chunk: Chunk) -> None:
        """Stores the good lines of the next chunk, or rejects all of them if the queue is full.

        Raises:
            InvalidRequestError: the idempotency key came before with another body.
        """
        good: list[tuple[int, EditRequest]] = []
        for number, line in chunk.lines:
            try:
                good.append((number, self._checker.check(_parse(line))))
            except InvalidRequestError as error:
                self._reject(number, error)
        once = self._once(chunk)
        # With a key a chunk without a good line is kept too: another body may have one there.
        if not (good or once):
            return
        try:
            edits = self._edits.submit([request for _, request in good], once)
        except BusyError as error:
            for number, _ in good:
                self._reject(number, error)
        else:
            self._ids.extend(edit.id for edit in edits)

    def report(self) -> ImportReport:
        """What became of the lines."""
        return ImportReport(
            accepted=len(self._ids),
            rejected=self._rejected,
            errors=self._errors,
            first_id=self._ids[0] if self._ids else None,
            last_id=self._ids[-1] if self._ids else None,
        )

    def _once(self, chunk: Chunk) -> Idempotency | None:
        if self._key is None:
            return None
        lines = [line if isinstance(line, bytes) else b"" for _, line in chunk.lines]
        body = b"\n".join([b"last" if chunk.last else b"", *lines])
        part, self._chunks = self._chunks, self._chunks + 1
        return Idempotency.of(self._key, IMPORT_PATH, body, part=part)

    def _reject(self, number: int, error: ErrataError) -> None:
        self._rejected += 1
        if len(self._errors) < _MAX_ERRORS:
            self._errors.append(ImportLineError(line=number, message=error.message, param=error.param, code=error.code))


def _parse(line: bytes | InvalidRequestError) -> EditRequest:
    if isinstance(line, InvalidRequestError):
        raise line
    try:
        return EditRequest.model_validate_json(line)
    except ValidationError as error:
        raise validation_error(error.errors(include_input=False, include_url=False)) from error


async def _lines(body: AsyncIterator[bytes], max_bytes: int) -> AsyncIterator[Line]:
    """The body's lines that are not blank, counted from 1; one that is too long is an error and is not kept."""
    number, buffer, too_long = 1, bytearray(), False

    def complete() -> bytes | InvalidRequestError:
        if too_long:
            return InvalidRequestError(f"the line has more than {max_bytes} bytes", code="line_too_long")
        return bytes(buffer)

    async for piece in body:
        *ended, rest = piece.split(b"\n")
        for part in ended:
            buffer += part
            too_long = too_long or len(buffer) > max_bytes
            if too_long or buffer.strip():
                yield number, complete()
            number, too_long = number + 1, False
            buffer.clear()
        buffer += rest
        if len(buffer) > max_bytes:
            too_long = True
            buffer.clear()
    if too_long or buffer.strip():
        yield number, complete()
