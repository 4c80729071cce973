"""EventStream: what happened, in order, in one capped Redis stream. The scripts in service/lua append to it too."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from service.keys import EventKeys
from service.schemas import Event

BLOCK_S = 5
NEWEST = "$"


class EventStream:
    """Appends events and follows them."""

    def __init__(self, redis: Redis, *, maximum: int) -> None:
        self._redis = redis
        self._key = EventKeys().events
        self._maximum = maximum

    def append(self, kind: str, data: Mapping[str, Any]) -> None:
        """Adds one event; ``kind`` is a stable name such as ``run.succeeded``."""
        self._redis.xadd(self._key, {"type": kind, "data": json.dumps(data)}, maxlen=self._maximum, approximate=True)

    def newest_id(self) -> str:
        """The id of the last event, or the stream's beginning."""
        rows = cast(list[tuple[str, dict[str, str]]], self._redis.xrevrange(self._key, count=1))
        return rows[0][0] if rows else "0-0"


async def follow(redis: AsyncRedis, after: str) -> AsyncIterator[Event | None]:
    """Events after an id, as they come; None whenever nothing came for some seconds, so that a caller can look up."""
    key = EventKeys().events
    if after == NEWEST:
        # Resolved once: between two reads from NEWEST an event would be lost.
        newest = cast(list[tuple[str, dict[str, str]]], await redis.xrevrange(key, count=1))
        after = newest[0][0] if newest else "0-0"
    while True:
        answer = await redis.xread({key: after}, count=100, block=BLOCK_S * 1000)
        if not answer:
            yield None
            continue
        for event_id, fields in _rows(answer):
            after = event_id
            yield Event(id=event_id, type=fields["type"], data=json.loads(fields["data"]))


def _rows(answer: Any) -> list[tuple[str, dict[str, str]]]:
    # RESP2 answers pairs, RESP3 a mapping with one more level of lists.
    if isinstance(answer, dict):
        return [row for batches in answer.values() for batch in batches for row in batch]
    return [row for _, rows in answer for row in rows]
