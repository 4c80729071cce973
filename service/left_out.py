"""LeftOutNodes: nodes that nobody waits for and the gateway sends nothing; each is tried again, less and less often.

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
class LeftOut:
    """A node that is left out: why, how often it was tried, and when it is tried again, in Unix seconds."""

    reason: str
    attempts: int
    again_at: float


def left_out(redis: Redis) -> dict[str, LeftOut]:
    """The nodes that are left out, by address."""
    kept = cast(dict[str, str], redis.hgetall(NodeKeys().left_out))
    return {address: LeftOut(**json.loads(record)) for address, record in kept.items()}


class LeftOutNodes:
    """Who leaves nodes out, tries them again and takes them back."""

    def __init__(self, redis: Redis, events: EventStream, clock: Callable[[], float]) -> None:
        self._redis = redis
        self._events = events
        self._clock = clock

    def addresses(self) -> set[str]:
        """Of all of them."""
        return set(left_out(self._redis))

    def waiting(self) -> set[str]:
        """Addresses of those that are not to be tried again yet."""
        now = self._clock()
        return {address for address, left in left_out(self._redis).items() if left.again_at > now}

    def add(self, address: str, trouble: ErrataError) -> None:
        """Leaves a node out, or for longer."""
        before = left_out(self._redis).get(address)
        attempts = before.attempts + 1 if before else 1
        # Of thousands of attempts the power would be no float.
        wait_s = min(2.0 ** min(attempts, 10), _LONGEST_WAIT_S)
        left = LeftOut(trouble.message, attempts, self._clock() + wait_s)
        self._keep(address, left)
        log.error("node.left_out", extra={"node": address, "again_in_s": wait_s, **asdict(left)})
        if before is None:
            self._events.append("node.left_out", {"address": address, "reason": trouble.message})

    def try_next(self, address: str) -> None:
        """Has a node that is left out tried at once."""
        if known := left_out(self._redis).get(address):
            self._keep(address, replace(known, again_at=self._clock()))

    def take_back(self, address: str) -> None:
        """Has a node serve again, if it was left out."""
        if self._redis.hdel(NodeKeys().left_out, address):
            log.info("node.taken_back", extra={"node": address})
            self._events.append("node.taken_back", {"address": address})

    def _keep(self, address: str, left: LeftOut) -> None:
        self._redis.hset(NodeKeys().left_out, address, json.dumps(asdict(left)))
