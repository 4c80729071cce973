"""Publisher: from a committed version to the moved pointer, by way of verification and, if one is asked for, a canary.

Each step is one that another process may repeat: whoever publishes after a crash goes on where the stores say.
"""

import logging
import time
from collections.abc import Callable, Sequence

from opentelemetry.trace import SpanKind
from redis.exceptions import LockError

from service.audit import Actor, acting
from service.canary import Judgement, judge
from service.errors import NotFoundError, UnavailableError
from service.fleet import Fleet
from service.logs import bound, of_edits
from service.nodes import NodeClient, NodeRefusedError
from service.registry import NotVerifiedError, OvertakenError
from service.runs import LeaseLostError
from service.schemas import Edit, EditError, EditStatus, Run, RunStatus, VersionState
from service.settings import Settings
from service.stores import Stores
from service.tracing import link, span
from service.verification import Demand, Verdict, sample, verify

log = logging.getLogger(__name__)

_PUBLISH_LOCK = "errata:lock:publish"
# Two publishers of one run would agree; the lock only spares the node. A dead holder's is gone soon.
_PUBLISH_LOCK_S = 60.0


def to_be_pinned(stores: Stores) -> set[int]:
    """The versions that keep their slots: the active one, the one before it, and the candidate."""
    active, run = stores.registry.active(), stores.runs.current()
    found = {active.active, active.previous} if active else set()
    if run and run.status is RunStatus.VERIFYING:
        found.add(run.version)
    return {version for version in found if version is not None}


class Publisher:
    """Verifies the versions of runs and makes them active, or gives their edits back."""

    def __init__(
        self, stores: Stores, fleet: Fleet, settings: Settings, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._stores = stores
        self._fleet = fleet
        self._settings = settings
        self._clock = clock

    def publish(self, run_id: str) -> None:
        """Verifies the version of a run on a node and makes it the canary or active, or gives its edits back.

        Does nothing if another process is at it, or no node is ready; the next tick tries again.
        """
        lock = self._stores.redis.lock(_PUBLISH_LOCK, timeout=_PUBLISH_LOCK_S, blocking=False)
        if not lock.acquire():
            return
        try:
            run = self._stores.runs.get(run_id)
            try:
                self._look(run)
            except UnavailableError as error:
                log.warning("publish.postponed", extra={"run": run_id, "reason": error.message})
                self._give_up_in_time(run, error)
        except (LeaseLostError, NotVerifiedError):
            # The lock expired in a long verification, and another publisher has judged the version.
            log.warning("publish.overtaken", extra={"run": run_id})
        finally:
            try:
                lock.release()
            except LockError:
                log.warning("publish.lock_expired", extra={"run": run_id})

    def _look(self, run: Run) -> None:
        canary = self._stores.canaries.current()
        judgement = judge(canary, self._settings, now=self._clock()) if canary else None
        if run.status is RunStatus.VERIFYING and not (judgement and judgement.waits):
            new = self._stores.edits.in_status(EditStatus.TRAINED)
            with (
                acting(Actor(run=run.id)),
                bound(run=run.id, **of_edits(new)),
                span("publish", kind=SpanKind.CONSUMER, run=run.id),
            ):
                link(lambda: self._stores.edits.traceparents(edit.id for edit in new))
                self._publish(run, new, judgement)

    def _publish(self, run: Run, new: Sequence[Edit], judgement: Judgement | None) -> None:
        registry = self._stores.registry
        version = run.version
        if version is None:
            raise NotFoundError(f"run {run.id} is verifying and has no version", code="version_not_found")
        if (active := registry.active()) and active.active == version:
            # The process that moved the pointer died before it could say so.
            self._complete(run)
            return
        record = registry.get(version)
        if record.state in {VersionState.REJECTED, VersionState.MISSING}:
            # The process that rejected it died before it gave the edits back, or the version store has lost it.
            self._reject(run, version, EditError(code="not_verified", message=record.reason or ""))
            return
        if record.state is VersionState.VERIFIED and active and active.epoch != run.epoch_of_activation:
            self._overtaken(run, OvertakenError(f"version {active.active} was activated meanwhile"))
            return
        if judgement and judgement.reason:
            self._reject(run, version, EditError(code="canary_failed", message=judgement.reason))
            return
        if self._passes(run, version, new):
            self._promote(run, version, was_canary=judgement is not None)

    def _passes(self, run: Run, version: int, new: Sequence[Edit]) -> bool:
        """Whether the nodes hold the version and answer its edits right; rejects it if not."""
        registry, edits = self._stores.registry, self._stores.edits
        began = self._clock()
        try:
            with span("load", version=version):
                nodes = self._fleet.load(version, registry.get(version).tensors)
            loaded = self._clock()
            self._fleet.pin(to_be_pinned(self._stores))
            with span("verify", version=version):
                verdict = self._verify(nodes, version, new)
        except NodeRefusedError as error:
            self._reject(run, version, EditError(code=error.code, message=error.message))
            return False
        if self._stores.runs.get(run.id).status is not RunStatus.VERIFYING:
            # The lock expired in a long verification, and another publisher has ended the run.
            return False
        edits.record_verification(run.id, verdict.outcomes)
        self._stores.runs.add_timing(run, "load", loaded - began)
        self._stores.runs.add_timing(run, "verify", self._clock() - loaded)
        if verdict.reasons:
            self._reject(run, version, EditError(code="not_verified", message="; ".join(verdict.reasons)))
            return False
        registry.record_confident(version, edits.sequences(verdict.confident))
        log.info("version.verified", extra={"version": version, "nodes": len(nodes)})
        return True

    def _promote(self, run: Run, version: int, *, was_canary: bool) -> None:
        """Makes a version that passed the canary, or active if it was the canary or none is asked for."""
        registry = self._stores.registry
        active = registry.active()
        try:
            registry.mark_verified(version, run=run)
            # The base, which a run over an empty edit set ends with, is no candidate.
            if not was_canary and self._settings.canary and active and version > active.active:
                self._stores.canaries.begin(run, version)
                log.info("version.canary", extra={"version": version})
                return
            with span("activate", version=version):
                registry.activate(version, run=run, promotes=was_canary)
        except OvertakenError as error:
            self._overtaken(run, error)
            return
        self._complete(run)

    def _overtaken(self, run: Run, error: OvertakenError) -> None:
        """Ends the run as stale, since the pointer moved; its version is kept and can be activated by number."""
        self._stores.edits.unclaim(run.id, refund=True, trained_to=EditStatus.HELD)
        self._end(run, RunStatus.STALE, EditError(code=error.code, message=error.message))

    def _give_up_in_time(self, run: Run, error: UnavailableError) -> None:
        """Rejects the run's version if no node could verify it for ``verify_max_s`` seconds: other edits wait."""
        canary = self._stores.canaries.current()
        since = canary.since + self._settings.canary_s if canary else run.verifying_since
        waited_s = self._clock() - (since or self._clock())
        if run.version is None or waited_s < self._settings.verify_max_s:
            return
        reason = EditError(code="not_verified", message=f"no node could be asked for {waited_s:.0f} s: {error.message}")
        self._mark_rejected(run, run.version, reason)
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
        self._mark_rejected(run, version, error)
        log.warning("version.rejected", extra={"version": version, "code": error.code, "reason": error.message})
        self._stores.edits.unclaim(run.id, error=error)
        self._end(run, RunStatus.FAILED, error)

    def _mark_rejected(self, run: Run, version: int, error: EditError) -> None:
        # A run over an empty edit set has no version of its own; the base is not rejected with it.
        if version > 0:
            self._stores.registry.reject(version, reason=error.message, run=run)

    def _end(self, run: Run, status: RunStatus, error: EditError | None = None) -> None:
        self._stores.runs.finish(run.id, status, error=error)
        self._stores.edits.settle()
        log.info("run.ended", extra={"run": run.id, "status": status, "version": run.version})
