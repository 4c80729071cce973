"""Counts and durations that several processes add to and that outlive them: fields of one Redis hash.

A field is ``name|label|…``; a histogram's are ``…|bound`` (not cumulative) and ``…|sum``. What happens with a change
of state is added in its own script (service/lua/prelude.lua) or pipeline; ``Measures`` adds the rest.
"""

import json
import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import cast

from redis import Redis
from redis.exceptions import RedisError

from service.keys import MetricKeys
from service.metrics.catalogue import Metric
from service.nodes import Held

log = logging.getLogger(__name__)

SUM = "sum"
OVERFLOW = "inf"


def named(metric: Metric, *parts: str) -> str:
    """The field of a metric with these labels."""
    return "|".join((metric.name, *parts))


def bounds(metric: Metric) -> list[str]:
    """The bounds of a histogram's buckets as its fields name them, the open one last."""
    return [*(f"{bound:g}" for bound in metric.buckets), OVERFLOW]


def count(commands: Redis, metric: Metric, *labels: str) -> None:
    """Adds one to a counter, as a command of the pipeline or connection that is given."""
    commands.hincrby(MetricKeys().metrics, named(metric, *labels), 1)


def observe(commands: Redis, metric: Metric, seconds: float, *labels: str) -> None:
    """Adds one duration to a histogram, as two commands of the pipeline or connection that is given."""
    bound = bounds(metric)[bisect_left(metric.buckets, seconds)]
    commands.hincrby(MetricKeys().metrics, named(metric, *labels, bound), 1)
    commands.hincrbyfloat(MetricKeys().metrics, named(metric, *labels, SUM), round(seconds, 6))


class Measures:
    """Adds what comes with no change of state in Redis. What cannot be counted is lost: it must not fail the deed."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._keys = MetricKeys()

    def count(self, metric: Metric, *labels: str) -> None:
        """Adds one to a counter."""
        self._try(lambda: count(self._redis, metric, *labels))

    def observe(self, metric: Metric, seconds: float, *labels: str) -> None:
        """Adds one duration to a histogram."""
        self._try(lambda: observe(self._redis, metric, seconds, *labels))

    def tick(self, at: float, held: Mapping[str, Sequence[Held]]) -> None:
        """Keeps when the control worker looked, and the versions that each node then held, by its address."""
        pipeline = self._redis.pipeline()
        pipeline.delete(self._keys.held)
        for address, versions in held.items():
            pipeline.hset(self._keys.held, address, json.dumps([asdict(version) for version in versions]))
        pipeline.set(self._keys.ticked, round(at, 3))
        self._try(pipeline.execute)

    def ticked_at(self) -> float | None:
        """When the control worker last looked, Unix seconds; None before the first time."""
        raw = cast(str | None, self._redis.get(self._keys.ticked))
        return float(raw) if raw else None

    def held(self) -> dict[str, list[Held]]:
        """The versions that each node held when the control worker last looked, by its address."""
        rows = cast(dict[str, str], self._redis.hgetall(self._keys.held))
        return {address: [Held(**version) for version in json.loads(text)] for address, text in rows.items()}

    def kept(self) -> dict[str, float]:
        """Every field of the hash."""
        rows = cast(dict[str, str], self._redis.hgetall(self._keys.metrics))
        return {name: float(value) for name, value in rows.items()}

    def _try(self, add: Callable[[], object]) -> None:
        try:
            add()
        except RedisError as error:
            log.warning("metrics.not_kept", extra={"reason": repr(error)})
