"""Canaries: a verified version that a part of the traffic gets before it is active, and what becomes of it.

There is one or none, and its run is under way for as long. The pointer's hash names it, so that whoever reads the
pointer reads both; how requests ended is counted beside it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from redis import Redis

from service.keys import VersionKeys
from service.lua import Scripts
from service.registry import OvertakenError
from service.runs import LeaseLostError
from service.schemas import Canary, Outcomes, Run
from service.settings import Settings


@dataclass(frozen=True)
class Judgement:
    """What the counts say of a canary: why it must be withdrawn, if it must, and whether its time is over."""

    reason: str | None
    over: bool

    @property
    def waits(self) -> bool:
        """Whether there is nothing to do but wait for more requests."""
        return not self.over and self.reason is None


def judge(canary: Canary, settings: Settings, *, now: float) -> Judgement:
    """Compares the canary's share of errors with the active version's.

    Before its time is over it must be withdrawn as soon as its errors would be too many even if no other came.
    """
    tried, served = canary.of_canary, canary.of_active
    answered = tried.ok + tried.errors
    over = not settings.canary or answered >= settings.canary_requests or now >= canary.since + settings.canary_s
    allowed = served.errors / max(1, served.ok + served.errors) + settings.canary_max_excess
    if tried.errors <= allowed * (answered if over else settings.canary_requests):
        return Judgement(None, over)
    reason = (
        f"{tried.errors} of {answered} requests failed as a canary, {served.errors} of {served.ok + served.errors} "
        f"of the active version; the most that is allowed above it is {settings.canary_max_excess:g}"
    )
    return Judgement(reason, over)


class Canaries:
    """The canary in Redis. Activation and rejection end it, in their own scripts."""

    def __init__(self, redis: Redis, *, events_max: int, clock: Callable[[], float] = time.time) -> None:
        self._redis = redis
        self._key = VersionKeys().canary

        scripts = Scripts(redis, events_max=events_max, clock=clock)
        self._begin = scripts.load("canary")
        self._count = scripts.load("canary_outcomes")

    def current(self) -> Canary | None:
        """The canary, if there is one."""
        fields = cast(dict[str, str], self._redis.hgetall(self._key))
        if not fields:
            return None

        def outcomes(of: str) -> Outcomes:
            return Outcomes(ok=int(fields.get(f"{of}_ok", 0)), errors=int(fields.get(f"{of}_errors", 0)))

        return Canary(
            version=int(fields["version"]),
            since=int(fields["since"]),
            of_canary=outcomes("canary"),
            of_active=outcomes("active"),
        )

    def begin(self, run: Run, version: int) -> None:
        """Gives a part of the traffic to the verified version of a run.

        Raises:
            LeaseLostError: the run has ended.
            OvertakenError: somebody moved the pointer since the run began.
        """
        answer = self._begin({"run": run.id, "version": version, "expected_epoch": run.epoch_of_activation})
        match answer.get("refused"):
            case "run":
                raise LeaseLostError(f"run {run.id} has ended")
            case "epoch":
                raise OvertakenError(f"the active version changed meanwhile, to {answer['active']}")

    def count(self, version: int, counts: Mapping[str, int]) -> None:
        """Adds how requests ended while the version was the canary; what comes after its end is dropped.

        Args:
            version: the canary.
            counts: numbers of requests by ``canary_ok``, ``canary_errors``, ``active_ok``, ``active_errors``.
        """
        self._count({"version": version, "counts": dict(counts)})
