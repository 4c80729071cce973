"""Liveness and readiness."""

from fastapi import APIRouter, Response
from redis.exceptions import RedisError

from service.api.dependencies import Parts, PartsDep
from service.metrics.state import WORKER_SILENCE_S
from service.schemas import Check, Health

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live")
def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"model": Health}})
def ready(parts: PartsDep, response: Response) -> Health:
    """Redis, a ready node and a train worker are there, and the base version is registered."""
    health = _health(parts)
    response.status_code = 200 if health.ready else 503
    return health


def _health(parts: Parts) -> Health:
    stores = parts.stores
    try:
        stores.redis.ping()
        active = stores.registry.active()
        workers = stores.runs.workers(within_s=WORKER_SILENCE_S)
    except RedisError as error:
        return Health(ready=False, active=None, checks={"redis": Check(ok=False, detail=repr(error))})
    nodes = [node.address for node in parts.reconciler.fleet.serving()]
    checks = {
        "redis": Check(ok=True, detail="answers"),
        "node": Check(ok=bool(nodes), detail=", ".join(nodes) or "no node is ready"),
        "train_worker": Check(ok=bool(workers), detail=", ".join(workers) or "no train worker is heard of"),
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
