"""One run from its claim to a committed version: claim, train, evaluate, gate, commit, hand over to verification.

It joins the pure parts (training, evaluation, delta) with the stores; it decides nothing that they decide.
"""

import dataclasses
import hashlib
import importlib.metadata
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from service.errors import ConflictError
from service.queue import TaskQueue
from service.registry import FencedError
from service.runs import LeaseLostError
from service.schemas import (
    Edit,
    EditCounts,
    EditError,
    EditStatus,
    EpochLoss,
    Run,
    RunStatus,
    VersionRecord,
    VersionState,
)
from service.settings import Settings
from service.store import Claim
from service.stores import Stores
from worker.delta import Base, DeltaError, Manifest, VersionInfo, VersionStore
from worker.evaluation.gate import Thresholds, decide
from worker.evaluation.metrics import EvaluationEdit, Evaluator, Metrics
from worker.lease import Lease
from worker.model import BaseModel
from worker.training.breadth_first import (
    EpochReport,
    TrainingCancelledError,
    TrainingConfig,
    TrainingError,
    TrainingResult,
    train,
)
from worker.training.encode import EncodingError, TrainingEdit, supported_formats
from worker.training.prefix import PrefixCache

log = logging.getLogger(__name__)

_LIBRARIES = ("errata", "torch", "transformers")


class GateRejectedError(Exception):
    """The candidate is not good enough; the message says in what."""


@dataclass(frozen=True)
class Trainer:
    """What a train worker keeps between runs: the loaded model, its caches, and the stores."""

    base: BaseModel
    prefix: PrefixCache
    evaluator: Evaluator
    versions: VersionStore
    stores: Stores
    queue: TaskQueue
    settings: Settings
    stopping: threading.Event

    def register_base(self) -> None:
        """Makes version 0 exist: the base's own tensors, with an empty edit set.

        Raises:
            ValueError: the store's version 0 is of another base model or location.
            DeltaError: it cannot be written.
        """
        if 0 not in self.versions.versions():
            self.versions.write(self._info(0, parent=None, run={}, metrics={}), self.base.tuned_tensors(), [])
        manifest = self.versions.manifest(0)
        if (manifest.base.fingerprint, manifest.location) != (self.base.fingerprint, self.base.location):
            raise ValueError(
                f"the version store is of {manifest.base.name} at {manifest.location}, the worker has {self.base.name} "
                f"at {self.base.location}; give this model another ERRATA_HOME or ERRATA_STORE"
            )
        registry = self.stores.registry
        if not registry.exists(0):
            counts = EditCounts(count=0, added=0, removed=0)
            registry.commit(self._record(manifest, None, VersionState.VERIFIED, counts), [], token=None)
        if registry.active() is None:
            registry.activate(0)

    def execute(self, run_id: str) -> None:
        """Carries out a queued run; does nothing if another is under way or this one is not queued any more."""
        run = self.stores.runs.start(run_id)
        if run is None:
            log.info("run.skipped", extra={"run": run_id})
            return
        log.info("run.started", extra={"run": run_id, "token": run.token, "parent": run.parent})
        with Lease(
            self.stores.runs,
            run,
            every_s=self.settings.run_lease_s / 4,
            longest_s=self.settings.run_max_s,
            stopping=self.stopping,
        ) as lease:
            try:
                self._attempt(run, lease)
            except (LeaseLostError, FencedError) as error:
                log.warning("run.taken_over", extra={"run": run_id, "reason": error.message})
            except TrainingCancelledError:
                self._cancelled(run, lease)
            except EncodingError as error:
                self._fail_edit(run, error)
            except GateRejectedError as error:
                self._fail(run, EditError(code="gate_rejected", message=str(error)))
            except (TrainingError, DeltaError, OSError, RuntimeError, ValueError, MemoryError) as error:
                log.error("run.crashed", exc_info=error, extra={"run": run_id})
                self._fail(run, EditError(code="training_failed", message=f"{type(error).__name__}: {error}"))

    def _attempt(self, run: Run, lease: Lease) -> None:
        claim = self.stores.edits.claim(run.id)
        self.stores.runs.update(run.id, edits=len(claim.members), new_edits=len(claim.claimed))
        if not claim.members:
            # The empty edit set is the base's.
            self._hand_over(run, 0)
            return
        config = self._config(claim)
        with self._phase(run, "train"):
            result = self._train(run, lease, claim, config)
        with self._phase(run, "evaluate"):
            metrics = self._evaluate(claim, result.tensors)
        gate = Thresholds(
            min_reliability=self.settings.gate_min_reliability,
            min_locality=self.settings.gate_min_locality,
            max_perplexity_ratio=self.settings.gate_max_perplexity_ratio,
        )
        decision = decide(metrics, gate)
        if not decision.passed:
            raise GateRejectedError("; ".join(decision.reasons))
        if lease.cancelled:
            raise TrainingCancelledError("cancelled while it was evaluated")
        with self._phase(run, "commit"):
            self._commit(run, claim, config, result, metrics)

    def _train(self, run: Run, lease: Lease, claim: Claim, config: TrainingConfig) -> TrainingResult:
        def report(epoch: EpochReport) -> None:
            loss = EpochLoss(epoch=epoch.epoch, loss=epoch.loss, steps=epoch.steps, seconds=round(epoch.seconds, 3))
            eta_s = (epoch.epoch_budget - epoch.epoch) * epoch.seconds
            self.stores.runs.add_epoch(run.id, loss, eta_s=eta_s)

        edits = [TrainingEdit(edit.id, edit.prompt, edit.target) for edit in claim.members]
        return train(self.base, edits, config, prefix=self.prefix, on_epoch=report, should_stop=lease.should_stop)

    def _evaluate(self, claim: Claim, tensors: Mapping[str, Tensor]) -> Metrics:
        new = set(claim.claimed)
        older = [edit for edit in claim.members if edit.id not in new][-self.settings.evaluate_sample :]
        measured = [edit for edit in claim.members if edit.id in new] + (older if self.settings.evaluate_sample else [])
        return self.evaluator.evaluate(
            [EvaluationEdit(edit.id, edit.prompt, edit.target, tuple(edit.rephrases)) for edit in measured], tensors
        )

    def _commit(self, run: Run, claim: Claim, config: TrainingConfig, result: TrainingResult, metrics: Metrics) -> None:
        registry = self.stores.registry
        version = registry.next_number()
        info = self._info(
            version, parent=run.parent, run=_run_inputs(self.base, run, config, result), metrics=_summary(metrics)
        )
        manifest = self.versions.write(info, result.tensors, [_stored(edit) for edit in claim.members])
        before = set(registry.members(run.parent or 0))
        now = {self.stores.edits.sequence(edit.id) for edit in claim.members}
        counts = EditCounts(count=len(now), added=len(now - before), removed=len(before - now))
        record = self._record(manifest, run.id, VersionState.COMMITTED, counts)
        registry.commit(record, [edit.id for edit in claim.members], token=run.token)
        self.stores.edits.trained(run.id, version)
        self._hand_over(run, version)

    def _hand_over(self, run: Run, version: int) -> None:
        self.stores.runs.hand_over(run, version)
        self.queue.publish(run.id)

    def _config(self, claim: Claim) -> TrainingConfig:
        chosen = {
            "learning_rate": self.settings.train_learning_rate,
            "batch_size": self.settings.train_batch_size,
            "max_epochs": self.settings.train_max_epochs,
        }
        # An edit that is tried again is tried in another order: the same inputs would give the same failure.
        new = set(claim.claimed)
        tried = max((edit.attempts for edit in claim.members if edit.id in new), default=1)
        given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        return dataclasses.replace(
            TrainingConfig(), seed=self.settings.train_seed + tried - 1, max_tokens=self.settings.max_model_len, **given
        )

    def _cancelled(self, run: Run, lease: Lease) -> None:
        if lease.lost:
            log.warning("run.taken_over", extra={"run": run.id})
            return
        if lease.overdue and not lease.cancelled:
            limit = f"the run took longer than {self.settings.run_max_s:g} s"
            self._fail(run, EditError(code="run_too_long", message=limit))
            return
        self.stores.edits.unclaim(run.id, refund=True)
        self.stores.runs.finish(run.id, RunStatus.CANCELLED)
        self.stores.edits.settle()
        log.info("run.cancelled", extra={"run": run.id, "shutting_down": not lease.cancelled})

    def _fail(self, run: Run, error: EditError) -> None:
        log.error("run.failed", extra={"run": run.id, "code": error.code, "reason": error.message})
        self.stores.edits.unclaim(run.id, error=error)
        self.stores.runs.finish(run.id, RunStatus.FAILED, error=error)
        self.stores.edits.settle()

    def _fail_edit(self, run: Run, error: EncodingError) -> None:
        """One edit cannot be learned at all: it fails alone, and the others try again without it."""
        reason = EditError(code="not_encodable", message=error.reason)
        with suppress(ConflictError):  # withdrawn meanwhile
            self.stores.edits.move(error.edit_id, EditStatus.FAILED, error=reason.model_dump_json(), run="")
        self.stores.edits.unclaim(run.id, refund=True)
        self.stores.runs.finish(run.id, RunStatus.FAILED, error=EditError(code=reason.code, message=str(error)))

    @contextmanager
    def _phase(self, run: Run, name: str) -> Iterator[None]:
        self.stores.runs.update(run.id, phase=name)
        began = time.perf_counter()
        yield
        self.stores.runs.add_timing(run.id, name, time.perf_counter() - began)

    def _info(self, version: int, *, parent: int | None, run: dict[str, Any], metrics: dict[str, Any]) -> VersionInfo:
        return VersionInfo(
            version=version,
            parent=parent,
            base=Base(name=self.base.name, fingerprint=self.base.fingerprint),
            location=self.base.location,
            run=run,
            metrics=metrics,
            created_at=int(time.time()),
        )

    def _record(self, manifest: Manifest, run: str | None, state: VersionState, counts: EditCounts) -> VersionRecord:
        return VersionRecord(
            version=manifest.version,
            parent=manifest.parent,
            run=run,
            state=state,
            fingerprint=manifest.base.fingerprint,
            location=manifest.location,
            tensors={name: tensor.sha256 for name, tensor in manifest.tensors.items()},
            formats=list(supported_formats(self.base.tokenizer)),
            training=dict(manifest.run),
            metrics=dict(manifest.metrics),
            edits=counts,
            created_at=manifest.created_at,
        )


def _run_inputs(base: BaseModel, run: Run, config: TrainingConfig, result: TrainingResult) -> dict[str, Any]:
    """What the manifest keeps so that the run can be repeated bit for bit, and how it went."""
    return {
        "id": run.id,
        "configuration": dataclasses.asdict(config),
        "epochs": [dataclasses.asdict(epoch) for epoch in result.epochs],
        "stopped": result.stopped,
        "steps": result.steps,
        "train_s": result.train_s,
        "device": str(base.device),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "tokenizer_sha256": hashlib.sha256(_tokenizer_text(base).encode()).hexdigest(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def _tokenizer_text(base: BaseModel) -> str:
    """What decides which tokens a run sees: vocabulary and merges, and the chat template."""
    backend: Any = base.tokenizer
    return f"{backend.backend_tokenizer.to_str()}\n{base.tokenizer.chat_template or ''}"


def _summary(metrics: Metrics) -> dict[str, Any]:
    formats = {form.value: dataclasses.asdict(measured) for form, measured in metrics.formats.items()}
    return {
        "formats": formats,
        "locality": metrics.locality,
        "perplexity": metrics.perplexity,
        "base_perplexity": metrics.base_perplexity,
        "perplexity_ratio": metrics.perplexity_ratio,
        "edits_measured": len({outcome.edit_id for outcome in metrics.outcomes}),
        "evaluate_s": metrics.evaluate_s,
    }


def _stored(edit: Edit) -> dict[str, Any]:
    return edit.model_dump(mode="json", include={"id", "prompt", "target", "rephrases", "metadata", "created_at"})
