"""Liveness and readiness."""

import logging

from fastapi import APIRouter, Response
from redis.exceptions import RedisError

from service.api.dependencies import PartsDep
from service.gateway.pool import NodePool
from service.runs import WORKER_SILENCE_S
from service.schemas import Check, Health
from service.stores import Stores

log = logging.getLogger(__name__)

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live")
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"model": Health}})
async def ready(parts: PartsDep, response: Response) -> Health:
    """Redis, a ready node and a train worker are there, and the base version is registered."""
    # Anybody may ask, as often as they like.
    health = await parts.health()
    response.status_code = 200 if health.ready else 503
    return health


def look(stores: Stores, pool: NodePool) -> Health:
    """Whether all is there. It names no part and passes on no error's words: whoever reads it has shown no key."""
    try:
        stores.redis.ping()
        active = stores.registry.active()
        workers = len(stores.runs.workers(within_s=WORKER_SILENCE_S))
    except RedisError as error:
        log.warning("health.without_redis", extra={"reason": repr(error)})
        return Health(ready=False, active=None, checks={"redis": Check(ok=False, detail="does not answer")})
    nodes = sum(pool.readiness().values())
    checks = {
        "redis": Check(ok=True, detail="answers"),
        "node": Check(ok=nodes > 0, detail=f"{nodes} ready" if nodes else "no node is ready"),
        "train_worker": Check(ok=workers > 0, detail=f"{workers} heard of" if workers else "none is heard of"),
        "version": Check(
            ok=active is not None, detail=f"version {active.active} is active" if active else "version 0 is not written"
        ),
    }
    return Health(
        ready=all(check.ok for check in checks.values()),
        active=active.active if active else None,
        canary=active.canary if active else None,
        checks=checks,
    )
