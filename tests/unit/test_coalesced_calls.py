"""Many requests that each want the same, begun behind their own beginning: a pull behind what they stored."""

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from service.api.dependencies import Shared


class Pulls:
    """Counts pulls; each lasts until it is let go."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = threading.Semaphore(0)
        self.fails = False

    def __call__(self) -> int:
        self.begun += 1
        assert self.ended.acquire(timeout=30)
        if self.fails:
            raise RuntimeError("no Redis")
        return self.begun


async def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def test_callers_that_come_while_a_call_is_under_way_share_the_next() -> None:
    pulls = Pulls()
    shared = Shared(pulls)
    first = asyncio.create_task(shared())
    await until(lambda: pulls.begun == 1)
    others = [asyncio.create_task(shared()) for _ in range(5)]
    await asyncio.sleep(0.05)
    assert pulls.begun == 1, "one at a time"
    pulls.ended.release()
    await first
    await until(lambda: pulls.begun == 2)
    assert not any(other.done() for other in others), "the one before began too early for them"
    pulls.ended.release()
    assert await asyncio.gather(*others) == [2] * 5


async def test_a_failure_is_told_to_all_that_share_the_call_and_ends_there() -> None:
    pulls = Pulls()
    shared = Shared(pulls)
    pulls.fails = True
    waiting = [asyncio.create_task(shared()) for _ in range(2)]
    pulls.ended.release()
    for one in waiting:
        with pytest.raises(RuntimeError, match="no Redis"):
            await one
    pulls.fails = False
    pulls.ended.release()
    await shared()
    assert pulls.begun == 2


async def test_a_caller_that_leaves_ends_the_call_for_nobody_else() -> None:
    pulls = Pulls()
    shared = Shared(pulls)
    leaves, stays = asyncio.create_task(shared()), asyncio.create_task(shared())
    await until(lambda: pulls.begun == 1)
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    pulls.ended.release()
    await stays
    assert pulls.begun == 1
