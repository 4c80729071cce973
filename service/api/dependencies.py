"""What the routers are given: the parts of the service, built once by ``create_app``."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from redis.asyncio import Redis as AsyncRedis
from starlette.concurrency import run_in_threadpool

from service.reconcile import Reconciler
from service.registry import VersionReader
from service.settings import Settings
from service.stores import Stores
from service.tokens import EditChecker


class SharedPull:
    """``Reconciler.pull`` for many requests at once: those that come while one is under way share the next one."""

    def __init__(self, pull: Callable[[], None]) -> None:
        self._pull = pull
        self._one_at_a_time = asyncio.Lock()
        self._next: asyncio.Task[None] | None = None

    async def __call__(self) -> None:
        """Returns after a pull that began after the call."""
        if self._next is None:
            self._next = asyncio.create_task(self._run())
        # The others wait for it too.
        await asyncio.shield(self._next)

    async def _run(self) -> None:
        async with self._one_at_a_time:
            self._next = None
            await run_in_threadpool(self._pull)


@dataclass(frozen=True)
class Parts:
    """Everything that a request may need.

    ``followers`` is for those who follow the events, for each holds a connection: all of them together hold up no edit.
    """

    settings: Settings
    stores: Stores
    versions: VersionReader
    reconciler: Reconciler
    pull: SharedPull
    checker: EditChecker
    async_redis: AsyncRedis
    followers: AsyncRedis
    stopping: asyncio.Event


# Not a plain function: FastAPI would send every request through a thread for it.
async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


PartsDep = Annotated[Parts, Depends(_parts)]
