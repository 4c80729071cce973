"""SlotCheck: what is in a node's device slots is, to the bit, what was trained; what is not is loaded again.

Memory that was overwritten answers as fluently as any other, so nothing but a comparison would tell. One slot of each
node is read back at a time, because the engine computes nothing meanwhile.
"""

import logging
import time
from collections.abc import Callable, Mapping

from service.errors import NotFoundError, UnavailableError
from service.fleet import Fleet
from service.metrics.catalogue import CHECKSUM_MISMATCHES
from service.nodes import NodeClient, NodeRefusedError
from service.stores import Stores

log = logging.getLogger(__name__)


class SlotCheck:
    """Reads slots back in turn, each node's next one every so many seconds."""

    def __init__(
        self,
        fleet: Fleet,
        stores: Stores,
        *,
        every_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._stores = stores
        self._every_s = every_s
        self._clock = clock
        self._due: float | None = None
        self._last: dict[str, int] = {}

    def look(self) -> None:
        """Checks one slot of each serving node if it is time; one that does not answer is looked at the next time."""
        now = self._clock()
        if self._due is not None and now < self._due:
            return
        self._due = now + self._every_s
        for node in self._fleet.serving():
            try:
                self._check_next(node)
            except (NodeRefusedError, UnavailableError) as error:
                log.warning("slot.not_checked", extra={"node": node.address, "reason": error.message})

    def _check_next(self, node: NodeClient) -> None:
        held = sorted(node.in_slots())
        if not held:
            return
        last = self._last.get(node.address, -1)
        version = next((number for number in held if number > last), held[0])
        self._last[node.address] = version
        try:
            trained = self._stores.registry.get(version).tensors
        except NotFoundError:
            # The gateway lets no request ask for it.
            log.warning("slot.unknown", extra={"node": node.address, "version": version})
            return
        if (found := node.checksums(version)) != trained:
            self._load_again(node, version, found, trained)

    def _load_again(self, node: NodeClient, version: int, found: Mapping[str, str], trained: Mapping[str, str]) -> None:
        differing = sorted(name for name in found.keys() | trained.keys() if found.get(name) != trained.get(name))
        log.error("slot.damaged", extra={"node": node.address, "version": version, "tensors": differing})
        self._stores.measures.count(CHECKSUM_MISMATCHES)
        self._stores.events.append("node.slot_damaged", {"address": node.address, "version": version})
        self._fleet.load_again(node, version, trained)
