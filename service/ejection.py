"""EjectedNodes: nodes out of service, which no activation waits for; each is tried again at growing intervals.

They are kept in Redis, because the API, the control worker and the gateway must agree on them.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import cast

from redis import Redis

from service.errors import ErrataError
from service.events import EventStream
from service.keys import NodeKeys

log = logging.getLogger(__name__)

# Of a single node nobody takes the place.
_LONGEST_WAIT_S = 30.0


@dataclass(frozen=True)
class Ejection:
    """Why a node is ejected, after how many attempts to serve, and when it is tried again, in Unix seconds."""

    reason: str
    attempts: int
    again_at: float


def ejections(redis: Redis) -> dict[str, Ejection]:
    """The nodes that are ejected, by address."""
    kept = cast(dict[str, str], redis.hgetall(NodeKeys().ejected))
    return {address: Ejection(**json.loads(record)) for address, record in kept.items()}


class EjectedNodes:
    """Ejects nodes, says when they are tried again, and readmits them."""

    def __init__(self, redis: Redis, events: EventStream, clock: Callable[[], float]) -> None:
        self._redis = redis
        self._events = events
        self._clock = clock

    def addresses(self) -> set[str]:
        """Of all of them."""
        return set(ejections(self._redis))

    def waiting(self) -> set[str]:
        """Addresses of those that are not to be tried again yet."""
        now = self._clock()
        return {address for address, ejection in ejections(self._redis).items() if ejection.again_at > now}

    def eject(self, address: str, trouble: ErrataError) -> None:
        """Ejects a node; one that is ejected already is tried again after a longer wait."""
        before = ejections(self._redis).get(address)
        attempts = before.attempts + 1 if before else 1
        # Of thousands of attempts the power would be no float.
        wait_s = min(2.0 ** min(attempts, 10), _LONGEST_WAIT_S)
        ejection = Ejection(trouble.message, attempts, self._clock() + wait_s)
        self._keep(address, ejection)
        log.error("node.left_out", extra={"node": address, "again_in_s": wait_s, **asdict(ejection)})
        if before is None:
            self._events.append("node.left_out", {"address": address, "reason": trouble.message})

    def try_next(self, address: str) -> None:
        """Has an ejected node tried at once."""
        if known := ejections(self._redis).get(address):
            self._keep(address, replace(known, again_at=self._clock()))

    def readmit(self, address: str) -> None:
        """Has a node serve again, if it was ejected."""
        if self._redis.hdel(NodeKeys().ejected, address):
            log.info("node.taken_back", extra={"node": address})
            self._events.append("node.taken_back", {"address": address})

    def _keep(self, address: str, ejection: Ejection) -> None:
        self._redis.hset(NodeKeys().ejected, address, json.dumps(asdict(ejection)))
