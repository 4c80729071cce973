"""One run from its claim to a committed version: claim, train, evaluate, gate, commit, hand over to verification.

It joins the pure parts (training, evaluation, delta) with the stores; it decides nothing that they decide.
"""

import logging
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from opentelemetry.trace import SpanKind
from redis.exceptions import RedisError
from torch import Tensor

from service.logs import bind, bound, of_edits
from service.queue import TaskQueue
from service.registry import FencedError
from service.runs import LeaseLostError, RunCancelledError
from service.schemas import EditCounts, EditError, Run, RunStatus, VersionState
from service.settings import Settings
from service.store import Claim
from service.stores import Stores
from service.tracing import link, span
from worker.candidate import Candidate, EditsFault, GateRejectedError, isolate
from worker.delta import VersionStore
from worker.evaluation.gate import Thresholds, decide
from worker.evaluation.metrics import EvaluationEdit, Metrics
from worker.lease import Lease
from worker.model import BaseModel
from worker.records import metrics_record, stored_edit, training_record, version_info, version_record
from worker.repair import Repair
from worker.run_training import RunTraining
from worker.training.encode import EncodingError
from worker.training.errors import TrainingCancelledError, TrainingDivergedError
from worker.wordings import untrained_rephrases
from worker.workbench import Workbench

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainer:
    """What a train worker keeps between runs: the loaded model, its caches, and the stores."""

    workbench: Workbench
    training: RunTraining
    versions: VersionStore
    stores: Stores
    queue: TaskQueue
    settings: Settings
    stopping: threading.Event

    @property
    def base(self) -> BaseModel:
        """The model that it trains."""
        return self.workbench.base

    def prepare(self) -> None:
        """Makes version 0 exist, the base's own tensors with an empty edit set, and repairs what a crash left.

        Raises:
            ValueError: the store's version 0 is of another base model or location.
            DeltaError: it cannot be written, or the store cannot be read.
        """
        if 0 not in self.versions.versions():
            info = version_info(self.base, 0, parent=None, run={}, metrics={})
            self.versions.write(info, self.base.tuned_tensors(), [])
        manifest = self.versions.manifest(0)
        if (manifest.base.fingerprint, manifest.location) != (self.base.fingerprint, self.base.location):
            raise ValueError(
                f"the version store is of {manifest.base.name} at {manifest.location}, the worker has {self.base.name} "
                f"at {self.base.location}; give this model another ERRATA_HOME or ERRATA_STORE"
            )
        Repair(self.versions, self.stores).repair()

    def execute(self, run_id: str) -> None:
        """Carries out a queued run; does nothing if another is under way or this one is not queued any more."""
        if self.stores.registry.active() is None:
            # Redis was lost: a run over what has come in since would take everything else out of the model.
            self.prepare()
        run = self.stores.runs.start(run_id)
        if run is None:
            log.info("run.skipped", extra={"run": run_id})
            return
        with bound(run=run_id), span("run", kind=SpanKind.CONSUMER, run=run_id):
            self._under_lease(run)

    def _under_lease(self, run: Run) -> None:
        log.info("run.started", extra={"token": run.token, "parent": run.parent})
        with Lease(
            self.stores.runs,
            run,
            every_s=self.settings.run_lease_s / 4,
            longest_s=self.settings.run_max_s,
            stopping=self.stopping,
        ) as lease:
            try:
                self._attempt_or_give_back(run, lease)
            except (LeaseLostError, FencedError) as error:
                log.warning("run.taken_over", extra={"reason": error.message})
            except RedisError as error:
                # Nobody can be told. The run is taken over once its lease has expired.
                log.error("run.interrupted", extra={"reason": repr(error)})

    def _attempt_or_give_back(self, run: Run, lease: Lease) -> None:
        """A run that ends otherwise than by its commit gives its edits back.

        Raises:
            LeaseLostError: the run was taken over; nothing more is to be done about it.
            FencedError: likewise.
            RedisError: Redis is away; nothing can be given back.
        """
        try:
            self._attempt(run, lease)
        except (LeaseLostError, FencedError, RedisError):
            raise
        except TrainingCancelledError:
            self._stopped(run, lease)
        except RunCancelledError:
            self._cancelled(run, shutting_down=False)
        except EncodingError as error:
            self._fail_edit(run, error)
        except GateRejectedError as error:
            self._fail(run, EditError(code="gate_rejected", message=str(error)))
        except Exception as error:
            # Whatever it is ends this run only: a worker without a model would serve nobody.
            log.exception("run.crashed")
            self._fail(run, EditError(code="training_failed", message=f"{type(error).__name__}: {error}".rstrip(": ")))

    def _attempt(self, run: Run, lease: Lease) -> None:
        claim = self.stores.edits.claim(run.id)
        self.stores.runs.update(run, edits=len(claim.members), new_edits=len(claim.claimed))
        bind(**of_edits(claim.new))
        link(lambda: self.stores.edits.traceparents(claim.claimed))
        log.info("run.claimed", extra={"edits": len(claim.members)})
        if not claim.members:
            # The empty edit set is the base's.
            self.stores.runs.hand_over(run, 0)
            self.queue.publish(run.id)
            return
        try:
            candidate = self._candidate(run, lease, claim, joinable=True)
        except (TrainingDivergedError, GateRejectedError) as fault:
            candidate = self._without_culprits(run, lease, fault)
        with self._phase(run, "commit"):
            version = self._commit(run, candidate)
        log.info("run.trained", extra={"version": version})
        self.queue.publish(run.id)
        self.training.forget()

    def _candidate(self, run: Run, lease: Lease, claim: Claim, *, joinable: bool) -> Candidate:
        with self._phase(run, "train"):
            trained = self.training.train_run(run, lease, claim, joinable=joinable)
        bind(**of_edits(trained.claim.new))
        with self._phase(run, "evaluate"):
            metrics = self._evaluate(run, trained.claim, trained.result.tensors)
        gate = Thresholds(
            min_reliability=self.settings.gate_min_reliability,
            min_locality=self.settings.gate_min_locality,
            max_perplexity_ratio=self.settings.gate_max_perplexity_ratio,
        )
        decision = decide(metrics, gate)
        if lease.cancelled:
            raise TrainingCancelledError("cancelled while it was evaluated")
        if not decision.passed:
            raise GateRejectedError("; ".join(decision.reasons))
        return Candidate(trained, metrics)

    def _without_culprits(self, run: Run, lease: Lease, fault: EditsFault) -> Candidate:
        """The candidate of the other edits. Raises the fault if no edit is found to be at fault, or there is none."""

        def attempt(some: Claim) -> Candidate:
            self.training.forget()
            return self._candidate(run, lease, some, joinable=False)

        log.warning("run.looks_for_culprits", extra={"reason": str(fault)})
        found = isolate(self.stores.edits.claim(run.id), fault, attempt)
        if found is None:
            raise fault
        code = "gate_rejected" if isinstance(fault, GateRejectedError) else "training_diverged"
        reason = EditError(code=code, message=f"the other edits are learned without it; with it: {fault}")
        self.stores.edits.set_aside(run.id, run.token, [edit.id for edit in found.culprits], reason)
        log.warning("run.set_aside", extra={"edits": [edit.id for edit in found.culprits]})
        if found.candidate is None:
            raise fault
        return found.candidate

    def _evaluate(self, run: Run, claim: Claim, tensors: Mapping[str, Tensor]) -> Metrics:
        new = set(claim.claimed)
        # A withdrawal brings nothing new; what is left is measured by one of the rest at least.
        sampled = max(self.settings.evaluate_sample, 0 if new else 1)
        older = [edit for edit in claim.members if edit.id not in new]
        # The same ones for every candidate of the run, others for the next run's.
        drawn = random.Random(run.id).sample(older, min(sampled, len(older)))  # noqa: S311 - not a secret
        measured = [edit for edit in claim.members if edit.id in new] + drawn
        left = dict(zip((edit.id for edit in claim.members), untrained_rephrases(claim.members), strict=True))
        if dropped := sum(len(edit.rephrases) - len(left[edit.id]) for edit in measured):
            log.info("run.trained_rephrases_left_out", extra={"rephrases": dropped})
        return self.workbench.evaluate(
            [EvaluationEdit(edit.id, edit.prompt, edit.target, left[edit.id]) for edit in measured], tensors
        )

    def _commit(self, run: Run, candidate: Candidate) -> int:
        trained, metrics = candidate.trained, candidate.metrics
        registry, edits = self.stores.registry, self.stores.edits
        version = registry.next_number(run, above=self.versions.last_number())
        members = trained.claim.members
        sequences = edits.sequences(edit.id for edit in members)
        before, now = set(registry.members(run.parent or 0)), set(sequences)
        counts = EditCounts(count=len(now), added=len(now - before), removed=len(before - now))
        how = training_record(
            self.base,
            trained.config,
            trained.result,
            counts,
            run=run.id,
            start=trained.parent or 0,
            chain=trained.chain,
        )
        info = version_info(self.base, version, parent=run.parent, run=how, metrics=metrics_record(metrics))
        kept = [stored_edit(edit, sequence) for edit, sequence in zip(members, sequences, strict=True)]
        manifest = self.versions.write(info, trained.result.tensors, kept)
        record = version_record(manifest, VersionState.COMMITTED)
        registry.commit(record, [edit.id for edit in members], token=run.token)
        return version

    def _stopped(self, run: Run, lease: Lease) -> None:
        if lease.lost:
            log.warning("run.taken_over")
            return
        if lease.overdue and not lease.cancelled:
            limit = f"the run took longer than {self.settings.run_max_s:g} s"
            self._fail(run, EditError(code="run_too_long", message=limit))
            return
        self._cancelled(run, shutting_down=not lease.cancelled)

    def _cancelled(self, run: Run, *, shutting_down: bool) -> None:
        self.stores.runs.give_up(run, RunStatus.CANCELLED, refund=True)
        self.stores.edits.settle()
        log.info("run.cancelled", extra={"shutting_down": shutting_down})

    def _fail(self, run: Run, error: EditError) -> None:
        log.error("run.failed", extra={"code": error.code, "reason": error.message})
        # First, as what follows may be done and not be heard of: what has failed is not gone on with.
        self.training.forget()
        self.stores.runs.give_up(run, RunStatus.FAILED, error=error)
        self.stores.edits.settle()

    def _fail_edit(self, run: Run, error: EncodingError) -> None:
        """One edit cannot be learned at all: it fails alone, and the others try again without it."""
        reason = EditError(code="not_encodable", message=error.reason)
        self.stores.edits.set_aside(run.id, run.token, [error.edit_id], reason)
        failure = EditError(code=reason.code, message=str(error))
        self.stores.runs.give_up(run, RunStatus.FAILED, error=failure, refund=True)

    @contextmanager
    def _phase(self, run: Run, name: str) -> Iterator[None]:
        self.stores.runs.update(run, phase=name)
        began = time.perf_counter()
        with span(name):
            yield
        self.stores.runs.add_timing(run, name, time.perf_counter() - began)
