"""Fleet: the nodes together. A version may become active once enough of them hold it.

A node that refuses what others hold, fails to load it for long, or holds other bits, is ejected until it holds the
active version. What all refuse is at fault itself, and none is ejected for it.
"""

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from redis import Redis

from service.ejection import EjectedNodes
from service.errors import ErrataError, UnavailableError
from service.events import EventStream
from service.metrics.catalogue import CHECKSUM_MISMATCHES, VERSION_LOAD_SECONDS
from service.metrics.kept import Measures
from service.nodes import Held, NodeClient, NodeRefusedError
from service.schemas import VersionRecord

log = logging.getLogger(__name__)

# A node that does not do what it is asked to may be busy, or the version store away for a moment.
_PATIENCE_S = 60.0

Trouble = NodeRefusedError | UnavailableError

Trained = Mapping[str, str]
"""SHA-256 of each tuned tensor of a version as it was trained, by parameter name."""


@dataclass(frozen=True)
class _Look:
    """What ``heal`` found on a node.

    Attributes:
        held: the versions that it holds; None if it did not say.
        fit: it holds the active version.
        tolerable: why it does not, where that is no reason to eject it yet.
    """

    held: list[Held] | None
    fit: bool = False
    tolerable: Trouble | None = None


class Fleet:
    """The configured nodes."""

    def __init__(
        self,
        nodes: Sequence[NodeClient],
        redis: Redis,
        events: EventStream,
        measures: Measures,
        *,
        quorum: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._nodes = nodes
        self._events = events
        self._ejected = EjectedNodes(redis, events, clock)
        self._measures = measures
        self._quorum = quorum
        self._clock = clock
        self._seen_ready: set[str] = set()
        # Since when a node has failed to load a version, or to say what it holds (None).
        self._failing: dict[tuple[str, int | None], float] = {}

    def serving(self) -> list[NodeClient]:
        """The nodes that answer and are not ejected."""
        ejected = self._ejected.addresses()
        return [node for node in self._answering() if node.address not in ejected]

    def holders(self, version: int) -> list[str]:
        """Addresses of the serving nodes that hold a version; one that does not say does not."""
        found = []
        for node in self.serving():
            with suppress(NodeRefusedError, UnavailableError):
                if version in node.resident():
                    found.append(node.address)
        return found

    def load(self, version: int, trained: Trained | None = None) -> list[NodeClient]:
        """Makes the serving nodes hold a version; returns those that do.

        Args:
            version: its number.
            trained: what a node must read back from its device; None asks no node to.

        Raises:
            UnavailableError: no node is ready, or fewer hold the version than the quorum asks for.
            NodeRefusedError: every node refuses the version.
        """
        if not (nodes := self.serving()):
            raise UnavailableError("no node is ready", code="no_ready_node")
        with ThreadPoolExecutor(len(nodes)) as pool:
            troubles = list(pool.map(lambda node: self.load_on(node, version, trained), nodes))
        holding = [node for node, trouble in zip(nodes, troubles, strict=True) if trouble is None]
        if holding:
            pairs = zip(nodes, troubles, strict=True)
            troubles = [self._judged(node, version, trouble) for node, trouble in pairs]
        refusals = [trouble for trouble in troubles if isinstance(trouble, NodeRefusedError)]
        if len(refusals) == len(nodes):
            raise refusals[0]
        # What one node holds the others could hold: one that refuses it is not fit to serve, and nobody waits for it.
        silent = [trouble for trouble in troubles if isinstance(trouble, UnavailableError)]
        needed = math.ceil(self._quorum * (len(nodes) - len(refusals)))
        if len(holding) < needed:
            raise UnavailableError(
                f"{len(holding)} of {len(nodes)} nodes hold version {version}, {needed} must: {silent[0].message}",
                code="node_unavailable",
            )
        for node, trouble in zip(nodes, troubles, strict=True):
            if isinstance(trouble, NodeRefusedError):
                self.eject(node, trouble)
        return holding

    def load_to_activate(self, record: VersionRecord) -> None:
        """Makes the serving nodes hold a version that is to be active; if none serves, the ejected nodes.

        An ejected node may have failed at the version that is active now and be able to hold this one. Each that reads
        it back as it was trained is tried again at the next ``heal``, without its wait, and can then be readmitted.

        Raises:
            UnavailableError: no node answers, or too few hold the version.
            NodeRefusedError: every node refuses the version, or holds other bits.
        """
        if self.serving() or not (nodes := self._answering()):
            self.load(record.version)
            return
        troubles = [self.load_on(node, record.version, record.tensors) for node in nodes]
        if len(failed := [trouble for trouble in troubles if trouble]) == len(nodes):
            raise failed[0]
        for node, trouble in zip(nodes, troubles, strict=True):
            if trouble is None:
                self._ejected.try_next(node.address)

    def heal(
        self,
        active: VersionRecord | None,
        canary: int | None = None,
        answers: Callable[[NodeClient, int], Trouble | None] = lambda *_: None,
    ) -> None:
        """Announces nodes that came and went, and makes each one hold the active version and the canary.

        An ejected node is readmitted when it holds the active version bit for bit as it was trained, and answers as it
        must.

        Args:
            active: the active version.
            canary: the canary's number, if there is one.
            answers: what is wrong with the node's answer at a version, if anything.
        """
        answering = self._answering()
        self._announce({node.address for node in answering})
        ejected, waiting = self._ejected.addresses(), self._ejected.waiting()
        looked_at = {
            node: self._heal_node(node, active, canary, answers if node.address in ejected else None)
            for node in answering
            if node.address not in waiting
        }
        failing = [(node, look.tolerable) for node, look in looked_at.items() if look.tolerable]
        self._tolerate(failing, others_do=any(look.fit for look in looked_at.values()))
        held = {node.address: look.held for node, look in looked_at.items() if look.held is not None}
        self._measures.tick(self._clock(), held)

    def _heal_node(
        self,
        node: NodeClient,
        active: VersionRecord | None,
        canary: int | None,
        answers: Callable[[NodeClient, int], Trouble | None] | None,
    ) -> _Look:
        """Has one node hold the active version and the canary, and readmits or ejects it; ``answers`` if it is ejected.

        A failure of a serving node that may be the version's fault is returned and not acted on.
        """
        held: list[Held] | None = None
        failure: Trouble | None
        try:
            held = node.held()
            failure = self._failure_of(node, active, {one.version for one in held}, answers)
        except (NodeRefusedError, UnavailableError) as error:
            failure = error
        if failure is None:
            self._judged(node, None, None)
            self._ejected.readmit(node.address)
            self._hold(node, canary, {one.version for one in held or ()})
            return _Look(held, fit=True)
        # Who refuses to say what it holds refuses no version.
        refuses_all = isinstance(failure, NodeRefusedError) and held is None
        if refuses_all or answers:
            self.eject(node, failure)
            return _Look(held)
        return _Look(held, tolerable=failure)

    def _failure_of(
        self,
        node: NodeClient,
        active: VersionRecord | None,
        holds: Collection[int],
        answers: Callable[[NodeClient, int], Trouble | None] | None,
    ) -> Trouble | None:
        """What keeps the node from serving the active version; ``answers`` is given for one that is ejected."""
        if active is None:
            return None
        if answers:
            return self.load_on(node, active.version, active.tensors) or answers(node, active.version)
        return None if active.version in holds else self.load_on(node, active.version, None)

    def _tolerate(self, failing: Sequence[tuple[NodeClient, Trouble]], *, others_do: bool) -> None:
        """Keeps nodes in service that do not load the active version, as long as no other node loads it either.

        Then the version or the store is at fault; with these nodes ejected nothing would answer, and nothing could be
        rolled back to. Once others load it, a node that refuses it is ejected at once, and one that fails to load it
        after ``_PATIENCE_S`` seconds.

        Args:
            failing: the nodes, each with what keeps it from loading the active version.
            others_do: whether any node holds the active version.
        """
        for node, trouble in failing:
            log.error("node.not_healed", extra={"node": node.address, "reason": trouble.message})
            judged = self._judged(node, None, trouble)
            if others_do and isinstance(judged, NodeRefusedError):
                self.eject(node, judged)

    def pin(self, versions: Collection[int]) -> None:
        """Has the serving nodes keep these versions in slots, and no others. What a node cannot keep is logged."""
        for node in self.serving():
            try:
                self._pin_on(node, set(versions))
            except (NodeRefusedError, UnavailableError) as error:
                log.warning("node.not_pinned", extra={"node": node.address, "reason": error.message})

    def _hold(self, node: NodeClient, canary: int | None, holds: Collection[int]) -> None:
        """Has the node hold the canary. One that refuses it serves on: perhaps it is the canary that is at fault."""
        if canary is None or canary in holds:
            return
        if trouble := self.load_on(node, canary, None):
            log.error("node.without_canary", extra={"node": node.address, "reason": trouble.message})

    def eject(self, node: NodeClient, trouble: ErrataError) -> None:
        """Takes the node out of service until it holds the active version as it was trained."""
        self._ejected.eject(node.address, trouble)

    def load_again(self, node: NodeClient, version: int, trained: Trained) -> bool:
        """Has the node forget a version and load it anew; one that does not hold it rightly then is ejected.

        Raises:
            NodeRefusedError: the node did not hold it.
            UnavailableError: the node does not answer.
        """
        node.evict(version)
        if trouble := self.load_on(node, version, trained):
            self.eject(node, trouble)
            return False
        log.info("slot.loaded_again", extra={"node": node.address, "version": version})
        return True

    def load_on(self, node: NodeClient, version: int, trained: Trained | None) -> Trouble | None:
        """What kept the node from holding the version, bit for bit as it was trained; None if nothing did."""
        try:
            self._measures.observe(VERSION_LOAD_SECONDS, node.prefetch(version))
            if trained is None or node.checksums(version) == trained:
                return None
        except (NodeRefusedError, UnavailableError) as error:
            return error
        self._measures.count(CHECKSUM_MISMATCHES)
        return NodeRefusedError(
            f"node {node.address} does not hold version {version} as it was trained", code="checksum_mismatch"
        )

    def _judged(self, node: NodeClient, version: int | None, trouble: Trouble | None) -> Trouble | None:
        """The trouble with loading a version, or with a node itself (None); a refusal once it has lasted too long."""
        about = (node.address, version)
        if not isinstance(trouble, UnavailableError):
            self._failing.pop(about, None)
            return trouble
        lasting_s = self._clock() - self._failing.setdefault(about, self._clock())
        if lasting_s < _PATIENCE_S:
            return trouble
        return NodeRefusedError(f"for {lasting_s:.0f} s: {trouble.message}", code="node_unavailable")

    def _pin_on(self, node: NodeClient, versions: set[int]) -> None:
        held = node.held()
        for version in versions.difference(one.version for one in held):
            if trouble := self.load_on(node, version, None):
                log.warning("node.not_pinned", extra={"node": node.address, "reason": trouble.message})
                versions = versions - {version}
        if {one.version for one in held if one.pinned} != versions:
            node.pin(versions)

    def _answering(self) -> list[NodeClient]:
        return [node for node in self._nodes if node.ready()]

    def _announce(self, answering: set[str]) -> None:
        came, went = answering - self._seen_ready, self._seen_ready - answering
        for kind, addresses in (("node.ready", came), ("node.away", went)):
            for address in sorted(addresses):
                self._events.append(kind, {"address": address})
        self._seen_ready = answering
