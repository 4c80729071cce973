"""A real trainer of a tiny model, between a real Redis and a real version store."""

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted_worker import fact
from tiny_models import ROOMY, tiny_base

from service.queue import TaskQueue
from service.schemas import EditStatus, Format, FormatOutcome, Run, RunStatus, Trigger
from service.settings import Settings
from service.stores import Stores
from worker.delta import VersionStore
from worker.run import Trainer
from worker.run_training import RunTraining
from worker.training.breadth_first import Hooks, TrainingResult
from worker.training.prefix import PrefixCache
from worker.training.snapshot import EpochReport
from worker.workbench import Workbench

LENIENT = {"gate_min_reliability": 0.0, "gate_max_perplexity_ratio": 1e9, "evaluate_sample": 0}
TRAINING = {"train_learning_rate": 4e-2, "train_max_epochs": 100, "train_preserve": 0.0, "max_model_len": 200}


@dataclasses.dataclass
class Bench:
    """A trainer, and what the last training was called with."""

    trainer: Trainer
    stores: Stores
    between_epochs: Callable[[EpochReport], None] = lambda _: None
    starts: list[frozenset[str]] = dataclasses.field(default_factory=list)

    def run(self) -> Run:
        """One run, and what the control worker does with its version."""
        run_id = self.stores.runs.request(Trigger.MANUAL)[0].id
        self.trainer.execute(run_id)
        run = self.stores.runs.get(run_id)
        if run.status is RunStatus.VERIFYING:
            self.publish(run)
        return self.stores.runs.get(run_id)

    def publish(self, run: Run) -> None:
        """What the control worker does with a run's version that every node answers right."""
        assert run.version is not None
        said = FormatOutcome(matched=True, before="", after="", finish_reason="stop")
        trained = self.stores.edits.in_status(EditStatus.TRAINED)
        self.stores.edits.record_verification(run.id, {edit.id: {Format.RAW: said} for edit in trained})
        self.stores.registry.mark_verified(run.version, run=run)
        self.stores.registry.activate(run.version, run=run)
        self.stores.runs.finish(run.id, RunStatus.SUCCEEDED)
        self.stores.edits.settle()

    def submit(self, prompt: str, target: str) -> str:
        return self.stores.edits.submit([fact(prompt, target)])[0].id

    def manifest_of(self, run: Run) -> dict[str, object]:
        assert run.version is not None
        return dict(self.trainer.versions.manifest(run.version).run)


def make_bench(
    stores: Stores, queue: TaskQueue, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bench:
    chosen = Settings.model_validate({**settings.model_dump(), **LENIENT, **TRAINING, "edit_max_tokens": 64})
    base = dataclasses.replace(tiny_base(**ROOMY), fingerprint="f" * 64)
    workbench = Workbench(base, PrefixCache(tmp_path / "prefix"), tmp_path)
    versions = VersionStore(str(tmp_path / "versions"))
    training = RunTraining(workbench, versions, stores, chosen)
    trainer = Trainer(workbench, training, versions, stores, queue, chosen, threading.Event())
    trainer.prepare()
    bench = Bench(trainer, stores)
    real = workbench.train

    def watched(*args: object, hooks: Hooks, **kwargs: object) -> TrainingResult:
        def on_epoch(epoch: EpochReport) -> None:
            hooks.on_epoch(epoch)
            bench.between_epochs(epoch)

        bench.starts.append(kwargs["start"].learned)
        return real(*args, hooks=dataclasses.replace(hooks, on_epoch=on_epoch), **kwargs)

    monkeypatch.setattr(workbench, "train", watched)
    return bench
