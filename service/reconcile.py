"""Reconciler: every ready node holds the active version, the pointer moves only when that is so, and runs follow edits.

Level-triggered: each step compares what is with what should be, so a step that was lost is made at the next tick.
It owns the pointer's moves. It does not train and does not know the delta's format.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from service.answer_check import AnswerCheck
from service.errors import ConflictError, NotFoundError
from service.fleet import Fleet
from service.metrics.catalogue import ACTIVATION_SECONDS
from service.nodes import NodeClient
from service.publication import Publisher, to_be_pinned
from service.queue import TaskQueue
from service.registry import NotVerifiedError
from service.runs import LeaseLostError
from service.schemas import Activation, EditError, EditStatus, Run, RunStatus, Trigger, VersionState
from service.settings import Settings
from service.slots import SlotCheck
from service.stores import Stores
from service.triggers import BACKOFF_RUNS, due

log = logging.getLogger(__name__)


class Reconciler:
    """Makes nodes, active version, edits and runs agree with each other; a tick is safe to repeat."""

    def __init__(
        self,
        stores: Stores,
        nodes: Sequence[NodeClient],
        queue: TaskQueue,
        settings: Settings,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._stores = stores
        self._fleet = Fleet(
            nodes, stores.redis, stores.events, stores.measures, quorum=settings.activation_quorum, clock=clock
        )
        self._queue = queue
        self._settings = settings
        self._clock = clock
        self._slots = SlotCheck(self._fleet, stores, every_s=settings.node_check_s)
        self._answers = AnswerCheck(
            self._fleet, stores, every_s=settings.answer_check_s, max_tokens=settings.edit_max_tokens
        )
        self._publisher = Publisher(stores, self._fleet, settings, clock=clock)
        self._looked_at = clock()

    @property
    def fleet(self) -> Fleet:
        """The nodes."""
        return self._fleet

    def activate(self, version: int, *, expected_active: int | None = None) -> Activation:
        """Makes a verified version resident on the nodes, then moves the pointer to it, which ends a canary.

        Raises:
            NotFoundError: no such version.
            NotVerifiedError: it is not verified, or was rejected meanwhile.
            OvertakenError: another version is active than expected.
            UnavailableError: no node is ready, or too few hold the version.
            NodeRefusedError: every node refuses the version.
        """
        began = self._clock()
        record = self._stores.registry.get(version)
        if record.state is not VersionState.VERIFIED:
            because = f": {record.reason}" if record.reason else ""
            raise NotVerifiedError(f"version {version} is {record.state}, not verified{because}", param="version")
        self._fleet.load_to_activate(record)
        activation = self._stores.registry.activate(version, expected_active=expected_active)
        self._stores.measures.observe(ACTIVATION_SECONDS, self._clock() - began)
        self._stores.edits.settle()
        return activation

    def roll_back(self, to: int | None) -> Activation:
        """Activates an older version; without a number the one that was active before.

        Raises:
            NotFoundError: no such version.
            ConflictError: there is no version before the active one.
        """
        if to is None:
            active = self._stores.registry.active()
            if active is None or active.previous is None:
                raise ConflictError("no version was active before this one", param="to", code="nothing_to_roll_back")
            to = active.previous
        if not self._stores.registry.exists(to):
            raise NotFoundError(f"no version {to}", param="to", code="version_not_found")
        return self.activate(to)

    def publish(self, run_id: str) -> None:
        """Publishes the version of a run, as far as can be, and requests the next run if one is due."""
        self._publisher.publish(run_id)
        self.pull()

    def tick(self) -> None:
        """One look at everything; called every few seconds."""
        # Before the nodes are asked: one that hangs would make every look a long one.
        self._take_over_lost_run()
        active = self._stores.registry.active()
        if active is None and self._queue.train_is_empty():
            # Redis is new, or was lost. Whoever has the version store makes again what can be.
            self._queue.repair()
        record = self._stores.registry.get(active.active) if active else None
        self._fleet.heal(record, active.canary if active else None, self._answers.trouble)
        self._fleet.pin(to_be_pinned(self._stores))
        self._stores.edits.settle()
        self._publish_what_waits()
        self.pull()
        self._resend_lost_message()
        self._slots.look()
        self._answers.look()
        self._looked_at = self._clock()

    def pull(self) -> None:
        """Requests a run if one is due by the trigger."""
        if self._due():
            self.request_run(self._settings.trigger)

    def request_run(self, trigger: Trigger) -> Run:
        """The queued run, enqueued if it is new."""
        run, created = self._stores.runs.request(trigger)
        if created:
            self._queue.train(run.id)
        return run

    def _due(self) -> bool:
        edits, runs = self._stores.edits, self._stores.runs
        # Asked behind every edit that comes in.
        if self._settings.trigger is Trigger.MANUAL or not runs.idle():
            return False
        return due(
            self._settings,
            counts=edits.counts(),
            recent=runs.page(after=None, limit=BACKOFF_RUNS).data,
            oldest_queued_at=edits.oldest_queued_at(),
            now=self._clock(),
        )

    def _take_over_lost_run(self) -> None:
        run = self._stores.runs.current()
        if run is None:
            self._free_stranded()
        elif run.status is RunStatus.TRAINING and not self._stores.runs.leased() and not self._was_away():
            error = EditError(code="worker_lost", message="the train worker of the run died")
            # A worker that wakes up meanwhile has either handed the run over or can do nothing more.
            with suppress(LeaseLostError):
                self._stores.runs.give_up(run, RunStatus.FAILED, error=error)
                log.warning("run.taken_over", extra={"run": run.id})
            self._stores.edits.settle()

    def _publish_what_waits(self) -> None:
        run = self._stores.runs.current()
        if run and run.status is RunStatus.VERIFYING:
            self.publish(run.id)

    def _was_away(self) -> bool:
        """Whether the last look was so long ago that Redis may have been away: its worker renews the lease first."""
        return self._clock() - self._looked_at > self._settings.run_lease_s / 2

    def _free_stranded(self) -> None:
        """Queues edits again whose run was ended by a process that died before it gave them back."""
        counts = self._stores.edits.counts()
        if counts[EditStatus.TRAINING] or counts[EditStatus.TRAINED]:
            error = EditError(code="worker_lost", message="the run that had it ended without giving it back")
            self._stores.edits.unclaim(None, error=error)

    def _resend_lost_message(self) -> None:
        run = self._stores.runs.queued()
        if run and not self._stores.runs.current() and self._queue.train_is_empty():
            self._queue.train(run.id)
