"""Routes of edits."""

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from service.api.dependencies import Parts, PartsDep
from service.api.errors import RESPONSES
from service.api.imports import Import, chunks
from service.events import follow
from service.schemas import (
    Edit,
    EditBatchRequest,
    EditDetail,
    EditProgress,
    EditRequest,
    EditState,
    EditStatus,
    ImportReport,
    Page,
    Run,
)
from service.store import Idempotency

router = APIRouter(prefix="/edits", tags=["edits"], responses=RESPONSES)

_MOVING = frozenset({EditStatus.QUEUED, EditStatus.TRAINING, EditStatus.TRAINED, EditStatus.RETRACTING})

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="The same key and body answer with the same edits. Each API key has its own: with another one, "
        "also the one that replaces it, they are new",
    ),
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
async def import_edits(request: Request, parts: PartsDep, idempotency_key: IdempotencyKey = None) -> ImportReport:
    """Stores corrections from a stream of JSON lines of any length; valid lines are kept, the others reported.

    It stores them piece by piece. One that broke off, sent again with the same Idempotency-Key, answers with the edits
    that are stored and stores the rest.
    """
    importer = Import(parts, idempotency_key)
    async for chunk in chunks(request.stream(), line_max_bytes=parts.settings.import_line_max_bytes):
        # The tokenizer and pydantic take their time: on the event loop every stream would wait for them.
        await run_in_threadpool(importer.store, chunk)
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
