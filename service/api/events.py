"""The event stream as server-sent events."""

from collections.abc import AsyncIterable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from service.api.access import Caller
from service.api.dependencies import PartsDep
from service.api.errors import RESPONSES
from service.events import NEWEST, follow

# Said by hand, because a model would be documented in the stream's own content type.
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": response["description"], "content": _ERROR} for status, response in RESPONSES.items()
}

router = APIRouter(tags=["events"], responses=_RESPONSES)

_ID = r"^(\$|[0-9]{1,19}(-[0-9]{1,19})?)$"


def _start(
    parts: PartsDep,
    after: Annotated[
        str | None, Query(pattern=_ID, description="Start behind this id; `0` from the oldest kept")
    ] = None,
    last_event_id: Annotated[str | None, Header(pattern=_ID)] = None,
) -> str:
    # Asks Redis in any case: once the stream has begun, a Redis that is away can no longer be a 503.
    newest = parts.stores.events.newest_id()
    given = last_event_id or after or NEWEST
    return newest if given == NEWEST else given


@router.get("/events", response_class=EventSourceResponse)
async def events(
    request: Request, parts: PartsDep, start: Annotated[str, Depends(_start)]
) -> AsyncIterable[ServerSentEvent]:
    """Edits, runs, versions, nodes: each change as it happens. A client that reconnects goes on where it was."""
    caller: Caller = request.state.caller
    async for event in follow(parts.followers, start):
        if not await caller.still_admitted():
            return
        if event:
            yield ServerSentEvent(id=event.id, event=event.type, data=event.data)
        if parts.stopping.is_set():
            return
