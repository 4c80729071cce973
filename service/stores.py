"""Stores: the Redis-backed owners of edits, versions, runs and events, built once in each process."""

from dataclasses import dataclass

from redis import Redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from service.events import EventStream
from service.recovery import Recovery
from service.registry import VersionRegistry
from service.runs import RunStore
from service.settings import Settings
from service.store import EditStore


@dataclass(frozen=True)
class Stores:
    """One connection pool and what is kept through it."""

    redis: Redis
    edits: EditStore
    registry: VersionRegistry
    runs: RunStore
    events: EventStream
    recovery: Recovery

    @classmethod
    def connect(cls, settings: Settings, *, patience_s: int = 0) -> "Stores":
        """Builds the stores; the connection itself is made at the first command.

        Args:
            settings: where Redis is.
            patience_s: a command waits so long, and a little longer, for a Redis that is away.

        Raises:
            ValueError: no Redis is configured.
        """
        if not settings.redis_url:
            raise ValueError("ERRATA_REDIS_URL is not set; `errata up` sets it for the embedded Redis")
        redis = Redis.from_url(
            settings.redis_url,
            decode_responses=True,
            socket_timeout=15,
            socket_connect_timeout=5,
            retry=Retry(ExponentialBackoff(cap=1, base=0.05), retries=5 + patience_s),
        )
        return cls(
            redis=redis,
            edits=EditStore(
                redis,
                events_max=settings.events_max,
                idempotency_ttl_s=settings.idempotency_ttl_s,
                max_attempts=settings.max_attempts,
            ),
            registry=VersionRegistry(redis, events_max=settings.events_max),
            runs=RunStore(redis, events_max=settings.events_max, lease_s=settings.run_lease_s),
            events=EventStream(redis, maximum=settings.events_max),
            recovery=Recovery(redis, events_max=settings.events_max),
        )
