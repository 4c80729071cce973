"""The training of one run: what it starts from, which edits join it on the way, what a kill leaves of it."""

import dataclasses
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.logs import of_edits
from service.schemas import EditStatus, EpochLoss, Run
from service.settings import Settings
from service.store import Claim
from service.stores import Stores
from service.tracing import link
from worker.delta import DeltaError, VersionStore
from worker.lease import Lease
from worker.training import snapshot as snapshots
from worker.training.breadth_first import Hooks, Start, TrainingResult
from worker.training.config import TrainingConfig, config_for, on_top
from worker.training.encode import TrainingEdit
from worker.training.snapshot import EpochReport, Saver, Snapshot, SnapshotMismatchError
from worker.wordings import without_contradicted
from worker.workbench import AnyEdit, Workbench, training_edit

log = logging.getLogger(__name__)

# Each gives a run's budget anew. Those that came first must not wait for ever for those that come.
_MOST_JOINS = 8


class EditSetChangedError(Exception):
    """What is trained must not stay in: an edit was withdrawn or superseded, or one that arrived contradicts it."""


@dataclass(frozen=True)
class TrainedRun:
    """What a run trained, from what, and how it went. `chain` counts the runs since the last one from the base."""

    claim: Claim
    config: TrainingConfig
    parent: int | None
    chain: int
    result: TrainingResult


@dataclass(frozen=True)
class RunTraining:
    """Trains runs of one base model."""

    workbench: Workbench
    versions: VersionStore
    stores: Stores
    settings: Settings

    def prepare(self) -> None:
        """Find out what the base itself is like, so that the first run is as quick as the next."""
        nothing = Claim([], [])
        self.workbench.prepare_training(self.config(nothing))

    def train_run(self, run: Run, lease: Lease, claim: Claim, *, joinable: bool = True) -> TrainedRun:
        """Train what a run has claimed and, if they may join, edits that arrive; the snapshot is kept until `forget`.

        Raises:
            TrainingError: it was cancelled or diverged.
            EncodingError: an edit cannot be trained on.
            LeaseLostError: the run was taken over.
        """
        try:
            return self._train(run, lease, claim, joinable=joinable)
        except EditSetChangedError as error:
            log.info("run.restarted", extra={"reason": str(error)})
            return self._train(run, lease, self.stores.edits.claim(run.id), joinable=False)

    def forget(self) -> None:
        """Drop the snapshot: its run has ended in a way that the next must not go on from."""
        try:
            self._snapshot_path.unlink(missing_ok=True)
        except OSError as error:  # the run has ended all the same
            log.warning("run.snapshot_not_removed", extra={"reason": str(error)})

    def _train(self, run: Run, lease: Lease, claim: Claim, *, joinable: bool) -> TrainedRun:
        config = self.config(claim)
        edits = _training_edits(claim.members)
        joined = _Joined(self.stores, run, claim, edits)
        hooks = Hooks(
            on_epoch=lambda epoch: self._report(run, epoch),
            on_snapshot=Saver(self._snapshot_path),
            should_stop=lease.should_stop,
            arrivals=joined.arrivals if joinable else tuple,
        )

        def attempt(start: Start, chain: int, snapshot: Snapshot | None) -> TrainedRun:
            chosen = on_top(config) if chain else config
            # An attempt more has a seed of its own, but what is gone on with goes on with its shuffles.
            chosen = dataclasses.replace(chosen, seed=snapshot.seed) if snapshot else chosen
            begun = dataclasses.replace(start, snapshot=snapshot)
            result = self.workbench.train(edits, chosen, start=begun, hooks=hooks)
            return TrainedRun(joined.claim, chosen, run.parent if chain else None, chain, result)

        from_base = Start(), 0
        warm = self._warm(run, claim)
        # What failed is not tried again from where it may have come by its failure. A snapshot is of a run that did not
        # fail but was ended from outside, so it is gone on from wherever that run began.
        snapshot = snapshots.load(self._snapshot_path)
        for start, chain in filter(None, (warm, from_base)) if snapshot else ():
            with suppress(SnapshotMismatchError):
                return attempt(start, chain, snapshot)
        return attempt(*(warm if warm and _tried(claim) == 1 else from_base), None)

    def config(self, claim: Claim) -> TrainingConfig:
        """The model's configuration, with what the settings say instead."""
        chosen = {
            "learning_rate": self.settings.train_learning_rate,
            "batch_size": self.settings.train_batch_size,
            "max_epochs": self.settings.train_max_epochs,
            "preserve": self.settings.train_preserve,
            "decay": self.settings.train_decay,
            "random_prefixes": self.settings.train_random_prefixes,
        }
        given: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        # An edit that is tried again is tried in another order: the same inputs would give the same failure.
        seed = self.settings.train_seed + _tried(claim) - 1
        usual = config_for(self.workbench.base.model.config.to_dict())
        return dataclasses.replace(usual, seed=seed, max_tokens=self.settings.max_model_len, **given)

    def _warm(self, run: Run, claim: Claim) -> tuple[Start, int] | None:
        """The active version as a start, and the length of the chain then; None unless the set only grew.

        What was trained in leaves only by starting from the base.
        """
        if not run.parent:
            return None
        learned = frozenset(edit.id for edit in self.stores.edits.by_sequence(self.stores.registry.members(run.parent)))
        if not learned <= {edit.id for edit in claim.members}:
            return None
        try:
            chain = int(str(self.versions.manifest(run.parent).run.get("chain", 0))) + 1
            if chain > self.settings.train_warm_runs:
                return None
            tensors = self.versions.load(run.parent, fingerprint=self.workbench.base.fingerprint)
        except DeltaError as error:
            log.warning("run.parent_not_readable", extra={"version": run.parent, "reason": str(error)})
            return None
        return Start(tensors, learned), chain

    def _report(self, run: Run, epoch: EpochReport) -> None:
        loss = EpochLoss(epoch=epoch.epoch, loss=epoch.loss, steps=epoch.steps, seconds=round(epoch.seconds, 3))
        # If the whole budget is used up, epoch by epoch as large as this one.
        eta_s = (1 - epoch.budget) / epoch.spent * epoch.seconds
        self.stores.runs.add_epoch(run, loss, eta_s=eta_s)

    @property
    def _snapshot_path(self) -> Path:
        return self.settings.home / "train" / "snapshot.safetensors"


class _Joined:
    """Edits that arrive while a run trains."""

    def __init__(self, stores: Stores, run: Run, claim: Claim, edits: Sequence[TrainingEdit]) -> None:
        self._stores = stores
        self._edits = list(edits)
        self._run = run
        self._joins = 0
        self.claim = claim

    def arrivals(self) -> Sequence[TrainingEdit]:
        """Claim what is queued. Raises EditSetChangedError when what is trained already must not stay in."""
        if self._joins == _MOST_JOINS or not self._stores.edits.counts()[EditStatus.QUEUED]:
            return ()
        now = self._stores.edits.claim(self._run.id)
        before = {edit.id for edit in self.claim.members}
        if not before <= {edit.id for edit in now.members}:
            raise EditSetChangedError("an edit left the set")
        new = [edit for edit in now.members if edit.id not in before]
        trained = {edit.id: edit for edit in _training_edits(now.members)}
        if any(trained[edit.id] != edit for edit in self._edits):
            raise EditSetChangedError("an edit that arrived contradicts a paraphrase")
        arrived = [trained[edit.id] for edit in new]
        self._edits += arrived
        self._joins += 1
        self.claim = Claim([*self.claim.members, *new], now.claimed)
        link(lambda: self._stores.edits.traceparents(set(now.claimed) - before))
        log.info("run.joined", extra=of_edits([edit for edit in new if edit.id in set(now.claimed)]))
        self._stores.runs.update(self._run, edits=len(self.claim.members), new_edits=len(now.claimed))
        return arrived


def _training_edits(members: Sequence[AnyEdit]) -> list[TrainingEdit]:
    return without_contradicted([training_edit(edit) for edit in members])


def _tried(claim: Claim) -> int:
    new = set(claim.claimed)
    return max((edit.attempts for edit in claim.members if edit.id in new), default=1)
