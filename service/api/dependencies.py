"""What the routers are given: the parts of the service, built once by ``create_app``."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

from fastapi import Depends, Request
from redis.asyncio import Redis as AsyncRedis
from starlette.concurrency import run_in_threadpool

from service.reconcile import Reconciler
from service.registry import VersionReader
from service.schemas import Health
from service.settings import Settings
from service.stores import Stores
from service.tokens import EditChecker

T = TypeVar("T")


class Shared(Generic[T]):
    """A function whose result requests share: calls that come while it runs get the result of its next run."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._one_at_a_time = asyncio.Lock()
        self._next: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        """Returns the result of a run that began after the call; one run at a time, in one thread."""
        if self._next is None:
            self._next = asyncio.create_task(self._run())
        # The others wait for it too.
        return await asyncio.shield(self._next)

    async def _run(self) -> T:
        async with self._one_at_a_time:
            self._next = None
            return await run_in_threadpool(self._function)


@dataclass(frozen=True)
class Parts:
    """Everything that a request may need.

    ``followers`` is for those who follow the events, for each holds a connection: all of them together hold up no edit.
    """

    settings: Settings
    stores: Stores
    versions: VersionReader
    reconciler: Reconciler
    pull: Shared[None]
    health: Shared[Health]
    checker: EditChecker
    async_redis: AsyncRedis
    followers: AsyncRedis
    stopping: asyncio.Event


# Not a plain function: FastAPI would send every request through a thread for it.
async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


PartsDep = Annotated[Parts, Depends(_parts)]
