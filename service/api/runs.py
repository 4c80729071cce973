"""Routes of training runs."""

from typing import Annotated

from fastapi import APIRouter, Query

from service.api.dependencies import PartsDep
from service.api.errors import RESPONSES
from service.schemas import Page, Run, Trigger

router = APIRouter(prefix="/runs", tags=["runs"], responses=RESPONSES)


@router.get("")
def list_runs(
    parts: PartsDep,
    after: Annotated[str | None, Query(max_length=64, description="The last id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[Run]:
    """Runs, newest first."""
    return parts.stores.runs.page(after=after, limit=limit)


@router.post("", status_code=202)
def start(parts: PartsDep) -> Run:
    """Starts a run over the cumulative set now, or names the one that already waits."""
    return parts.reconciler.request_run(Trigger.MANUAL)


@router.get("/{run_id}")
def get_run(run_id: str, parts: PartsDep) -> Run:
    """One run: loss per epoch, timings, estimated time to its end."""
    return parts.stores.runs.get(run_id)


@router.post("/{run_id}/cancel", status_code=202)
def cancel(run_id: str, parts: PartsDep) -> Run:
    """Stops a run; its edits are queued again and wait for the next edit or a run that is asked for."""
    return parts.stores.runs.cancel(run_id)
