"""Reconciler: every ready node holds the active version, the pointer moves only when that is so, and runs follow edits.

Level-triggered: each step compares what is with what should be, so a step that was lost is made at the next tick.
It owns the pointer's moves. It does not train and does not know the delta's format.
"""

import logging
import time
from collections.abc import Callable, Sequence

from opentelemetry.trace import SpanKind
from redis.exceptions import LockError

from service.answer_check import AnswerCheck
from service.audit import Actor, acting
from service.canary import judge
from service.errors import ConflictError, NotFoundError, UnavailableError
from service.fleet import Fleet
from service.logs import bound, of_edits
from service.metrics.catalogue import ACTIVATION_SECONDS
from service.nodes import NodeClient, NodeRefusedError
from service.queue import TaskQueue
from service.registry import OvertakenError
from service.runs import LeaseLostError
from service.schemas import Activation, Canary, Edit, EditError, EditStatus, Run, RunStatus, Trigger, VersionState
from service.settings import Settings
from service.slots import SlotCheck
from service.stores import Stores
from service.tracing import link, span
from service.triggers import RECENT_RUNS, due
from service.verification import Demand, Verdict, sample, verify

log = logging.getLogger(__name__)

_PUBLISH_LOCK = "errata:lock:publish"
# Two publishers of one run would agree; the lock only spares the node. A dead holder's is gone soon.
_PUBLISH_LOCK_S = 60.0


class Reconciler:
    """Brings nodes, pointer, edits and runs together."""

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
        self._looked_at = clock()

    @property
    def fleet(self) -> Fleet:
        """The nodes."""
        return self._fleet

    def activate(self, version: int, *, expected_active: int | None = None) -> Activation:
        """Makes a verified version resident on the nodes, then moves the pointer to it, which ends a canary.

        Raises:
            NotFoundError: no such version.
            ConflictError: it is not verified, or another version is active than expected.
            UnavailableError: no node is ready, or too few hold the version.
            NodeRefusedError: every node refuses the version.
        """
        began = self._clock()
        record = self._stores.registry.get(version)
        if record.state is not VersionState.VERIFIED:
            because = f": {record.reason}" if record.reason else ""
            raise ConflictError(
                f"version {version} is {record.state}, not verified{because}",
                param="version",
                code="version_not_verified",
            )
        self._fleet.load(version)
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
        """Verifies the version of a run on a node and makes it the canary or active, or gives its edits back.

        Does nothing if another process is at it, or no node is ready; the next tick tries again.
        """
        lock = self._stores.redis.lock(_PUBLISH_LOCK, timeout=_PUBLISH_LOCK_S, blocking=False)
        if not lock.acquire():
            return
        try:
            run = self._stores.runs.get(run_id)
            if run.status is RunStatus.VERIFYING:
                new = self._stores.edits.in_status(EditStatus.TRAINED)
                with (
                    acting(Actor(run=run.id)),
                    bound(run=run_id, **of_edits(new)),
                    span("publish", kind=SpanKind.CONSUMER, run=run_id),
                ):
                    link(lambda: self._stores.edits.traceparents(edit.id for edit in new))
                    self._publish(run, new)
        except LeaseLostError:
            # The lock expired in a long verification, and another publisher has ended the run.
            log.warning("publish.overtaken", extra={"run": run_id})
        except UnavailableError as error:
            log.warning("publish.postponed", extra={"run": run_id, "reason": error.message})
            self._give_up_in_time(run, error)
        finally:
            try:
                lock.release()
            except LockError:
                log.warning("publish.lock_expired", extra={"run": run_id})
        self.pull()

    def tick(self) -> None:
        """One look at everything; called every few seconds."""
        active = self._stores.registry.active()
        record = self._stores.registry.get(active.active) if active else None
        self._fleet.heal(record, active.canary if active else None, self._answers.trouble)
        self._fleet.pin(self._to_be_pinned())
        self._stores.edits.settle()
        self._take_over_lost_run()
        self.pull()
        self._resend_lost_message()
        self._slots.look()
        self._answers.look()
        self._looked_at = self._clock()

    def pull(self) -> None:
        """Requests a run if the trigger says so."""
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
            recent=runs.page(after=None, limit=RECENT_RUNS).data,
            oldest_queued_at=edits.oldest_queued_at(),
            now=self._clock(),
        )

    def _publish(self, run: Run, new: Sequence[Edit]) -> None:
        registry = self._stores.registry
        version = run.version
        if version is None:
            raise NotFoundError(f"run {run.id} is verifying and has no version", code="version_not_found")
        if (active := registry.active()) and active.active == version:
            # The process that moved the pointer died before it could say so.
            self._complete(run)
            return
        record = registry.get(version)
        if record.state is VersionState.REJECTED:
            # The process that rejected it died before it gave the edits back.
            self._reject(run, version, EditError(code="not_verified", message=record.reason or ""))
            return
        if record.state is VersionState.VERIFIED and active and active.epoch != run.epoch_of_activation:
            self._overtaken(run, OvertakenError(f"version {active.active} was activated meanwhile"))
            return
        if canary := self._stores.canaries.current():
            judgement = judge(canary, self._settings, now=self._clock())
            if judgement.reason:
                self._reject(run, version, EditError(code="canary_failed", message=judgement.reason))
                return
            if not judgement.over:
                return
        if self._passes(run, version, new):
            self._promote(run, version, canary)

    def _passes(self, run: Run, version: int, new: Sequence[Edit]) -> bool:
        """Whether the nodes hold the version and answer its edits right; rejects it if not."""
        registry, edits = self._stores.registry, self._stores.edits
        began = self._clock()
        try:
            with span("load", version=version):
                nodes = self._fleet.load(version, registry.get(version).tensors)
            loaded = self._clock()
            self._fleet.pin(self._to_be_pinned())
            with span("verify", version=version):
                verdict = self._verify(nodes, version, new)
        except NodeRefusedError as error:
            self._reject(run, version, EditError(code=error.code, message=error.message))
            return False
        if self._stores.runs.get(run.id).status is not RunStatus.VERIFYING:
            # The lock expired in a long verification, and another publisher has ended the run.
            return False
        for edit_id, outcomes in verdict.outcomes.items():
            edits.record_verification(edit_id, outcomes)
        self._stores.runs.add_timing(run, "load", loaded - began)
        self._stores.runs.add_timing(run, "verify", self._clock() - loaded)
        if verdict.reasons:
            self._reject(run, version, EditError(code="not_verified", message="; ".join(verdict.reasons)))
            return False
        registry.record_sure(version, edits.sequences(verdict.sure))
        log.info("version.verified", extra={"version": version, "nodes": len(nodes)})
        return True

    def _promote(self, run: Run, version: int, canary: Canary | None) -> None:
        """Makes a version that passed the canary, or active if it was the canary or none is asked for."""
        registry = self._stores.registry
        active = registry.active()
        try:
            if canary is None:
                registry.mark(version, VersionState.VERIFIED)
                # The base, which a run over an empty edit set ends with, is no candidate.
                if self._settings.canary and active and version > active.active:
                    self._stores.canaries.begin(run, version)
                    log.info("version.canary", extra={"version": version})
                    return
            with span("activate", version=version):
                registry.activate(version, expected_epoch=run.epoch_of_activation, promotes=canary is not None)
        except OvertakenError as error:
            self._overtaken(run, error)
            return
        self._complete(run)

    def _overtaken(self, run: Run, error: OvertakenError) -> None:
        """What users rolled back to stands; the version is kept and can be activated by name."""
        self._stores.edits.unclaim(run.id, refund=True, trained_to=EditStatus.HELD)
        self._end(run, RunStatus.STALE, EditError(code=error.code, message=error.message))

    def _to_be_pinned(self) -> set[int]:
        """The active version, the one before it, and the candidate."""
        active, run = self._stores.registry.active(), self._stores.runs.current()
        found = {active.active, active.previous} if active else set()
        if run and run.status is RunStatus.VERIFYING:
            found.add(run.version)
        return {version for version in found if version is not None}

    def _give_up_in_time(self, run: Run, error: UnavailableError) -> None:
        """No node verified the version for so long that other edits must not wait for it any more."""
        canary = self._stores.canaries.current()
        since = canary.since + self._settings.canary_s if canary else run.verifying_since
        waited_s = self._clock() - (since or self._clock())
        if run.version is None or waited_s < self._settings.verify_max_s:
            return
        reason = EditError(code="not_verified", message=f"no node could be asked for {waited_s:.0f} s: {error.message}")
        self._mark_rejected(run.version, reason)
        self._stores.edits.unclaim(run.id, error=reason, refund=True)
        self._end(run, RunStatus.FAILED, reason)

    def _complete(self, run: Run) -> None:
        self._stores.edits.settle()
        # What is not live by now was rolled back since.
        self._stores.edits.unclaim(run.id, refund=True, trained_to=EditStatus.HELD)
        self._end(run, RunStatus.SUCCEEDED)

    def _verify(self, nodes: Sequence[NodeClient], version: int, new: Sequence[Edit]) -> Verdict:
        registry, settings = self._stores.registry, self._settings
        active = registry.active()
        members = self._stores.edits.by_sequence(registry.members(version))
        older = [edit for edit in members if edit.status is EditStatus.LIVE and edit.verified]
        return verify(
            nodes,
            version=version,
            active=active.active if active else 0,
            new=new,
            older=sample(older, settings.verify_sample, seed=version),
            formats=registry.get(version).formats,
            demand=Demand(settings.verify_min_new, settings.verify_min_kept),
            max_tokens=settings.edit_max_tokens,
        )

    def _reject(self, run: Run, version: int, error: EditError) -> None:
        log.warning("version.rejected", extra={"version": version, "code": error.code, "reason": error.message})
        self._mark_rejected(version, error)
        self._stores.edits.unclaim(run.id, error=error)
        self._end(run, RunStatus.FAILED, error)

    def _mark_rejected(self, version: int, error: EditError) -> None:
        # A run over an empty edit set has no version of its own; the base is not rejected with it.
        if version > 0:
            self._stores.registry.reject(version, reason=error.message)

    def _end(self, run: Run, status: RunStatus, error: EditError | None = None) -> None:
        self._stores.runs.finish(run.id, status, error=error)
        self._stores.edits.settle()
        log.info("run.ended", extra={"run": run.id, "status": status, "version": run.version})

    def _take_over_lost_run(self) -> None:
        run = self._stores.runs.current()
        if run is None:
            self._free_stranded()
            return
        if run.status is RunStatus.VERIFYING:
            self.publish(run.id)
        elif not self._stores.runs.leased() and not self._was_away():
            # Ended first: a worker that wakes up meanwhile has either handed the run over or can do nothing more.
            error = EditError(code="worker_lost", message="the train worker of the run died")
            if self._stores.runs.finish(run.id, RunStatus.FAILED, error=error, only=RunStatus.TRAINING):
                self._stores.edits.unclaim(run.id, error=error)
                self._stores.edits.settle()
                log.warning("run.taken_over", extra={"run": run.id})

    def _was_away(self) -> bool:
        """Whether the last look was so long ago that Redis may have been away: its worker renews the lease first."""
        return self._clock() - self._looked_at > self._settings.run_lease_s / 2

    def _free_stranded(self) -> None:
        """Edits of a run that was ended by somebody who died before giving them back."""
        counts = self._stores.edits.counts()
        if counts[EditStatus.TRAINING] or counts[EditStatus.TRAINED]:
            error = EditError(code="worker_lost", message="the run that had it ended without giving it back")
            self._stores.edits.unclaim(None, error=error)

    def _resend_lost_message(self) -> None:
        run = self._stores.runs.queued()
        if run and not self._stores.runs.current() and self._queue.train_is_empty():
            self._queue.train(run.id)
