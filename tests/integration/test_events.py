"""EventStream and what follows it, against a real Redis."""

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis as AsyncRedis
from scripted_worker import fact

from service.events import NEWEST, follow
from service.settings import Settings
from service.stores import Stores


@pytest.fixture
async def async_redis(settings: Settings) -> AsyncIterator[AsyncRedis]:
    redis = AsyncRedis.from_url(settings.redis_url, decode_responses=True)
    yield redis
    await redis.aclose()


async def test_nothing_is_lost_between_two_reads(
    stores: Stores, async_redis: AsyncRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.events.BLOCK_S", 1)
    stores.events.append("before", {})
    events = follow(async_redis, NEWEST)
    assert await anext(events) is None, "a quiet second"
    stores.events.append("between", {"n": 1})
    found = await anext(events)
    assert found is not None
    assert (found.type, found.data) == ("between", {"n": 1})


async def test_a_reader_goes_on_where_it_was(stores: Stores, async_redis: AsyncRedis) -> None:
    assert stores.events.newest_id() == "0-0"
    stores.events.append("first", {})
    seen = stores.events.newest_id()
    [edit] = stores.edits.submit([fact("a", "1")])
    found = await anext(follow(async_redis, seen))
    assert found is not None
    assert (found.type, found.data) == ("edit.queued", {"id": edit.id, "status": "queued"})
