"""Stores: the Redis-backed owners of what Errata keeps, built once in each process."""

from dataclasses import dataclass

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from service.api_keys import KeyStore
from service.audit import AuditLog
from service.canary import Canaries
from service.events import BLOCK_S, EventStream
from service.metrics.kept import Measures
from service.recovery import Recovery
from service.registry import VersionRegistry
from service.runs import RunStore
from service.settings import Settings
from service.store import EditStore

_BACKOFF = ExponentialBackoff(cap=1, base=0.05)
_RETRIES = 5
_MAX_CONNECTIONS = 4096


@dataclass(frozen=True)
class Stores:
    """One connection pool and what is kept through it."""

    redis: Redis
    edits: EditStore
    registry: VersionRegistry
    canaries: Canaries
    runs: RunStore
    events: EventStream
    measures: Measures
    keys: KeyStore
    audit: AuditLog
    recovery: Recovery

    @classmethod
    def connect(cls, settings: Settings, *, patience_s: float = 15, retries: int = _RETRIES) -> "Stores":
        """Builds the stores; the connection itself is made at the first command.

        Args:
            settings: where Redis is.
            patience_s: longest wait for one answer of Redis.
            retries: how often a command is repeated when Redis does not answer, from the fifth on once a second.

        Raises:
            ValueError: no Redis is configured.
        """
        redis = Redis.from_url(
            _url(settings),
            decode_responses=True,
            socket_timeout=patience_s,
            socket_connect_timeout=min(5, patience_s),
            retry=Retry(_BACKOFF, retries=retries),
        )
        return cls(
            redis=redis,
            edits=EditStore(
                redis,
                events_max=settings.events_max,
                idempotency_ttl_s=settings.idempotency_ttl_s,
                max_attempts=settings.max_attempts,
                queue_max_edits=settings.queue_max_edits,
                review=settings.review,
            ),
            registry=VersionRegistry(redis, events_max=settings.events_max),
            canaries=Canaries(redis, events_max=settings.events_max),
            runs=RunStore(
                redis,
                events_max=settings.events_max,
                lease_s=settings.run_lease_s,
                max_attempts=settings.max_attempts,
            ),
            events=EventStream(redis, maximum=settings.events_max),
            measures=Measures(redis),
            keys=KeyStore(redis, events_max=settings.events_max),
            audit=AuditLog(redis),
            recovery=Recovery(redis, events_max=settings.events_max),
        )


def connect_async(settings: Settings) -> AsyncRedis:
    """A client that no thread waits for, with connections of its own.

    Raises:
        ValueError: no Redis is configured.
    """
    return AsyncRedis.from_url(
        _url(settings),
        decode_responses=True,
        socket_timeout=BLOCK_S * 3,
        socket_connect_timeout=5,
        max_connections=_MAX_CONNECTIONS,
        retry=AsyncRetry(_BACKOFF, retries=_RETRIES),
    )


def _url(settings: Settings) -> str:
    if not settings.redis_url:
        raise ValueError("ERRATA_REDIS_URL is not set; `errata up` sets it for the embedded Redis")
    return settings.redis_url
