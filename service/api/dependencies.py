"""What the routers are given: the parts of the service, built once by ``create_app``."""

import asyncio
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from redis.asyncio import Redis as AsyncRedis

from service.reconcile import Reconciler
from service.settings import Settings
from service.stores import Stores
from service.tokens import EditChecker


@dataclass(frozen=True)
class Parts:
    """Everything that a request may need."""

    settings: Settings
    stores: Stores
    reconciler: Reconciler
    checker: EditChecker
    async_redis: AsyncRedis
    stopping: asyncio.Event


# Not a plain function: FastAPI would send every request through a thread for it.
async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


PartsDep = Annotated[Parts, Depends(_parts)]
