"""Routes of edits."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from service.api.dependencies import Parts, PartsDep
from service.api.errors import RESPONSES, validation_error
from service.errors import BusyError, ErrataError, InvalidRequestError
from service.events import follow
from service.schemas import (
    Edit,
    EditBatchRequest,
    EditDetail,
    EditProgress,
    EditRequest,
    EditState,
    EditStatus,
    ImportLineError,
    ImportReport,
    Page,
    Run,
)
from service.store import Idempotency

router = APIRouter(prefix="/edits", tags=["edits"], responses=RESPONSES)

IMPORT_PATH = "/edits/import"
_IMPORT_CHUNK = 200
_IMPORT_ERRORS = 1_000
_MOVING = frozenset({EditStatus.QUEUED, EditStatus.TRAINING, EditStatus.TRAINED, EditStatus.RETRACTING})

IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, description="The same key and body answer with the same edits"),
]


@router.post("", status_code=202)
async def submit(
    body: EditRequest, parts: PartsDep, response: Response, idempotency_key: IdempotencyKey = None
) -> Edit:
    """Stores a correction. It is on disk when this answers; a run follows as the trigger says."""
    once = _once(idempotency_key, "/edits", body.model_dump_json())
    checked = await run_in_threadpool(parts.checker.check, body)
    # Many threads that wait for Redis are in each other's way, and in the event loop's, when they come back.
    [edit] = await parts.stores.edits.submit_awaited(parts.async_redis, [checked], once)
    await parts.pull()
    response.headers["Location"] = f"/edits/{edit.id}"
    return edit


@router.post("/batch", status_code=202)
def submit_batch(body: EditBatchRequest, parts: PartsDep, idempotency_key: IdempotencyKey = None) -> Page[Edit]:
    """Stores up to 1,000 corrections, all or none."""
    for index, edit in enumerate(body.edits):
        parts.checker.check(edit, at=f"edits.{index}.")
    once = _once(idempotency_key, "/edits/batch", body.model_dump_json())
    edits = parts.stores.edits.submit(body.edits, once)
    parts.reconciler.pull()
    return Page[Edit](data=edits, has_more=False)


@router.post(
    "/import",
    status_code=202,
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/x-ndjson": {"schema": {"type": "string"}}}}
    },
)
async def import_edits(request: Request, parts: PartsDep) -> ImportReport:
    """Stores corrections from a stream of JSON lines of any length; valid lines are kept, the others reported."""
    importer = _Import(parts)
    async for number, line in _lines(request, parts.settings.import_line_max_bytes):
        importer.add(number, line)
        if len(importer.pending) >= _IMPORT_CHUNK:
            await run_in_threadpool(importer.flush)
    await run_in_threadpool(importer.flush)
    await run_in_threadpool(parts.reconciler.pull)
    return importer.report()


@router.get("")
def list_edits(
    parts: PartsDep,
    status: EditStatus | None = None,
    q: Annotated[str | None, Query(min_length=1, max_length=200, description="Text in the prompt or target")] = None,
    after: Annotated[str | None, Query(max_length=64, description="The last id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[Edit]:
    """Edits, newest first."""
    return parts.stores.edits.page(status=status, q=q, after=after, limit=limit)


@router.get("/{edit_id}")
def get_edit(edit_id: str, parts: PartsDep) -> EditDetail:
    """One edit, the versions that contain it, and the model's answers before and after."""
    edit = parts.stores.edits.get(edit_id)
    [sequence] = parts.stores.edits.sequences([edit_id])
    versions = parts.stores.registry.containing(sequence)
    return EditDetail(**edit.model_dump(), versions=versions)


@router.get("/{edit_id}/status")
async def get_status(
    edit_id: str,
    parts: PartsDep,
    wait: Annotated[
        float, Query(ge=0, description="Seconds to wait for a change; an edit at rest answers at once")
    ] = 0,
) -> EditState:
    """Where the edit is in its life, the outcome per format, and how far its run is."""
    since = await run_in_threadpool(parts.stores.events.newest_id)
    state = await run_in_threadpool(_state, parts, edit_id)
    deadline = time.monotonic() + min(wait, parts.settings.wait_max_s)
    if state.status not in _MOVING or wait == 0:
        return state
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
            async for event in follow(parts.followers, since):
                changed = event and event.data.get("id") == edit_id and event.data.get("status") != state.status
                if changed or parts.stopping.is_set():
                    break
    except TimeoutError:
        pass
    return await run_in_threadpool(_state, parts, edit_id)


@router.delete("/{edit_id}", status_code=202)
def retract(edit_id: str, parts: PartsDep) -> Edit:
    """Takes an edit back: it leaves the cumulative set, and is retracted once a version without it is live."""
    edit = parts.stores.edits.retract(edit_id)
    parts.reconciler.pull()
    return edit


@router.post("/{edit_id}/approve", status_code=202)
def approve(edit_id: str, parts: PartsDep) -> Edit:
    """Lets an edit that another key proposed join the cumulative set; a run follows as the trigger says."""
    edit = parts.stores.edits.approve(edit_id)
    parts.reconciler.pull()
    return edit


@router.post("/{edit_id}/release", status_code=202)
def release(edit_id: str, parts: PartsDep) -> Edit:
    """Lets an edit that a rollback held join the cumulative set again."""
    edit = parts.stores.edits.release(edit_id)
    parts.reconciler.pull()
    return edit


def _once(key: str | None, route: str, body: str) -> Idempotency | None:
    return Idempotency.of(key, route, body.encode()) if key else None


def _state(parts: Parts, edit_id: str) -> EditState:
    edit = parts.stores.edits.get(edit_id)
    run = parts.stores.runs.current() if edit.status in {EditStatus.TRAINING, EditStatus.TRAINED} else None
    return EditState(
        id=edit.id,
        status=edit.status,
        version=edit.version,
        verified=edit.verified,
        progress=_progress(run) if run else None,
        error=edit.error,
        updated_at=edit.updated_at,
    )


def _progress(run: Run) -> EditProgress:
    last = run.epochs[-1] if run.epochs else None
    return EditProgress(
        run=run.id,
        phase=run.phase,
        epoch=last.epoch if last else 0,
        loss=last.loss if last else None,
        elapsed_s=round(time.time() - (run.started_at or time.time()), 1),
    )


class _Import:
    """Collects the lines of one import and stores them in chunks."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.pending: list[tuple[int, EditRequest]] = []
        self._errors: list[ImportLineError] = []
        self._rejected = 0
        self._ids: list[str] = []

    def add(self, number: int, line: bytes | InvalidRequestError) -> None:
        """Checks one line."""
        try:
            if isinstance(line, InvalidRequestError):
                raise line
            self.pending.append((number, self._parts.checker.check(_parse(line))))
        except InvalidRequestError as error:
            self._reject(number, error)

    def flush(self) -> None:
        """Stores what is pending, or rejects it if the queue is full."""
        if not self.pending:
            return
        requests = [request for _, request in self.pending]
        try:
            edits = self._parts.stores.edits.submit(requests)
            self._ids.extend(edit.id for edit in edits)
        except BusyError as error:
            for number, _ in self.pending:
                self._reject(number, error)
        self.pending = []

    def report(self) -> ImportReport:
        """What became of the lines."""
        return ImportReport(
            accepted=len(self._ids),
            rejected=self._rejected,
            errors=self._errors,
            first_id=self._ids[0] if self._ids else None,
            last_id=self._ids[-1] if self._ids else None,
        )

    def _reject(self, number: int, error: ErrataError) -> None:
        self._rejected += 1
        if len(self._errors) < _IMPORT_ERRORS:
            self._errors.append(ImportLineError(line=number, message=error.message, param=error.param, code=error.code))


def _parse(line: bytes) -> EditRequest:
    try:
        return EditRequest.model_validate_json(line)
    except ValidationError as error:
        raise validation_error(error.errors(include_input=False, include_url=False)) from error


async def _lines(request: Request, max_bytes: int) -> AsyncIterator[tuple[int, bytes | InvalidRequestError]]:
    """The body's lines that are not blank, counted from 1; one that is too long is an error and is not kept."""
    number, buffer, too_long = 1, bytearray(), False

    def complete() -> bytes | InvalidRequestError:
        if too_long:
            return InvalidRequestError(f"the line has more than {max_bytes} bytes", code="line_too_long")
        return bytes(buffer)

    async for chunk in request.stream():
        *ended, rest = chunk.split(b"\n")
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
