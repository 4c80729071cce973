"""Fleet: the nodes together. A version may become active once enough of them hold it.

A node that does not come to hold what the others hold is left out: nobody waits for it, the gateway sends it nothing,
and it is tried again, less and less often, until it holds the active version. Who is left out is kept in Redis, because
the API, the control worker and the gateway must agree on it.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import cast

from redis import Redis

from service.errors import ErrataError, UnavailableError
from service.events import EventStream
from service.keys import NodeKeys
from service.nodes import NodeClient, NodeRefusedError

log = logging.getLogger(__name__)

# A single node that cannot reach the version store for a moment must not be away for long behind it.
_LONGEST_WAIT_S = 30.0

Trained = Mapping[str, str]
"""SHA-256 of each tuned tensor of a version as it was trained, by parameter name."""


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


class Fleet:
    """The configured nodes."""

    def __init__(
        self,
        nodes: Sequence[NodeClient],
        redis: Redis,
        events: EventStream,
        *,
        quorum: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._nodes = nodes
        self._redis = redis
        self._events = events
        self._quorum = quorum
        self._clock = clock
        self._seen_ready: set[str] = set()

    def serving(self) -> list[NodeClient]:
        """The nodes that answer and are not left out."""
        left = left_out(self._redis)
        return [node for node in self._answering() if node.address not in left]

    def holders(self, version: int) -> list[str]:
        """Addresses of the serving nodes that hold a version; one that does not say does not."""
        found = []
        for node in self.serving():
            with suppress(NodeRefusedError, UnavailableError):
                if version in node.resident():
                    found.append(node.address)
        return found

    def load(self, version: int, trained: Trained | None = None) -> list[NodeClient]:
        """Makes the nodes hold a version, but for those that are left out for now; returns those that do.

        Args:
            version: its number.
            trained: what a node must read back from its device; None asks no node to.

        Raises:
            UnavailableError: no node is ready, or fewer hold the version than the quorum asks for.
            NodeRefusedError: every node refuses the version.
        """
        if not (nodes := self._due(self._answering())):
            raise UnavailableError("no node is ready", code="no_ready_node")
        with ThreadPoolExecutor(len(nodes)) as pool:
            troubles = list(pool.map(lambda node: _loaded(node, version, trained), nodes))
        holding = [node for node, trouble in zip(nodes, troubles, strict=True) if trouble is None]
        refusals = [trouble for trouble in troubles if isinstance(trouble, NodeRefusedError)]
        if len(refusals) == len(nodes):
            raise refusals[0]
        # What one node holds the others could hold: one that refuses it is not fit to serve, and nobody waits for it.
        silent = [trouble for trouble in troubles if isinstance(trouble, UnavailableError)]
        needed = math.ceil(self._quorum * (len(nodes) - len(refusals)))
        if len(holding) < max(1, needed):
            raise UnavailableError(
                f"{len(holding)} of {len(nodes)} nodes hold version {version}, {max(1, needed)} must: "
                f"{silent[0].message}",
                code="node_unavailable",
            )
        for node, trouble in zip(nodes, troubles, strict=True):
            if trouble is None:
                self._take_back(node)
            else:
                self._leave_out(node, trouble)
        return holding

    def heal(self, active: int | None) -> None:
        """Tells of nodes that came and went, and makes each ready one hold the active version."""
        answering = self._answering()
        self._tell({node.address for node in answering})
        if active is None:
            return
        for node in self._due(answering):
            try:
                if active not in node.resident():
                    node.prefetch(active)
                    log.info("node.healed", extra={"node": node.address, "version": active})
            except (NodeRefusedError, UnavailableError) as trouble:
                self._leave_out(node, trouble)
            else:
                self._take_back(node)

    def _answering(self) -> list[NodeClient]:
        return [node for node in self._nodes if node.ready()]

    def _due(self, nodes: Sequence[NodeClient]) -> list[NodeClient]:
        """Those that are not left out, or are to be tried again."""
        left, now = left_out(self._redis), self._clock()
        return [node for node in nodes if node.address not in left or left[node.address].again_at <= now]

    def _leave_out(self, node: NodeClient, trouble: ErrataError) -> None:
        before = left_out(self._redis).get(node.address)
        attempts = before.attempts + 1 if before else 1
        wait_s = min(2.0**attempts, _LONGEST_WAIT_S)
        left = LeftOut(trouble.message, attempts, self._clock() + wait_s)
        self._redis.hset(NodeKeys().left_out, node.address, json.dumps(asdict(left)))
        log.error("node.left_out", extra={"node": node.address, "again_in_s": wait_s, **asdict(left)})
        if before is None:
            self._events.append("node.left_out", {"address": node.address, "reason": trouble.message})

    def _take_back(self, node: NodeClient) -> None:
        if self._redis.hdel(NodeKeys().left_out, node.address):
            log.info("node.taken_back", extra={"node": node.address})
            self._events.append("node.taken_back", {"address": node.address})

    def _tell(self, answering: set[str]) -> None:
        came, went = answering - self._seen_ready, self._seen_ready - answering
        for kind, addresses in (("node.ready", came), ("node.away", went)):
            for address in sorted(addresses):
                self._events.append(kind, {"address": address})
        self._seen_ready = answering


def _loaded(node: NodeClient, version: int, trained: Trained | None) -> NodeRefusedError | UnavailableError | None:
    """What kept the node from holding the version, bit for bit as it was trained; None if nothing did."""
    try:
        node.prefetch(version)
        if trained is None or node.checksums(version) == trained:
            return None
    except (NodeRefusedError, UnavailableError) as error:
        return error
    return NodeRefusedError(
        f"node {node.address} does not hold version {version} as it was trained", code="checksum_mismatch"
    )
