"""One training from a file of edits to a version folder and its measures, without the service.

It joins the same parts as `worker.run` does, for a caller who has a file instead of a queue.
"""

import dataclasses
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service.defaults import PREFIX_CACHE_BYTES
from service.schemas import EditCounts
from worker.delta import VersionStore
from worker.distributed import first_process_first, own_device, process_group, processes, rank
from worker.edit_files import EditRow, read_edits
from worker.evaluation.metrics import Metrics
from worker.model import BaseModel, load_base
from worker.placement import DeviceMap
from worker.records import metrics_record, stored_rows, training_record, version_info
from worker.training import snapshot as snapshots
from worker.training.breadth_first import Hooks, Start, TrainingResult
from worker.training.config import TrainingConfig, config_for
from worker.training.parallel import Ranks
from worker.training.prefix import PrefixCache
from worker.training.snapshot import EpochReport, Saver, Snapshot, SnapshotMismatchError
from worker.wordings import without_contradicted
from worker.workbench import Workbench, evaluation_edit, training_edit


@dataclass(frozen=True)
class Experiment:
    """What is asked for. `changes` are the fields of the model's own TrainingConfig that are set otherwise."""

    edits: Path
    out: Path
    model: str
    location: str = "auto"
    plain: bool = False
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    limit: int | None = None
    device: str | None = None
    device_map: DeviceMap | None = None
    dtype: torch.dtype = torch.bfloat16
    cache: Path | None = None
    cache_bytes: int = PREFIX_CACHE_BYTES
    evaluate: bool = True


def run_experiment(experiment: Experiment) -> dict[str, Any] | None:
    """Train, write the version, measure it; JSON values that say how it went. None in every process but the first.

    Raises what its parts do: EditFileError, CheckpointError, ValueError, DeltaError, TrainingError,
    SnapshotMismatchError, OSError.
    """
    rows = read_edits(experiment.edits, experiment.limit)
    _check_writable(experiment.out)
    base = load_base(
        experiment.model,
        experiment.location,
        device=own_device(experiment.device),
        dtype=experiment.dtype,
        device_map=experiment.device_map,
    )
    usual = config_for(base.model.config.to_dict(), plain=experiment.plain)
    config = dataclasses.replace(usual, **experiment.changes)
    with process_group(base.device) as ranks:
        return _Setup(experiment, base, config, ranks).run(rows)


class _Setup:
    """A loaded model, how it is trained, and where its results go."""

    def __init__(self, experiment: Experiment, base: BaseModel, config: TrainingConfig, ranks: Ranks) -> None:
        self._experiment = experiment
        self._base = base
        self._config = config
        self._ranks = ranks
        cache = experiment.cache or _own_cache()
        self._workbench = Workbench(base, PrefixCache(cache / "prefix", experiment.cache_bytes), cache)
        # The seed is part of the name: a snapshot carries its run's, and would go on with it.
        self._snapshot = experiment.out / f"interrupted-{config.seed}.safetensors"

    def run(self, rows: Sequence[EditRow]) -> dict[str, Any] | None:
        before = snapshots.load(self._snapshot)
        try:
            result = self._train(rows, before)
        except SnapshotMismatchError as error:
            hint = "remove it, or name another folder for other arguments"
            raise SnapshotMismatchError(f"{self._snapshot}: {error}; {hint}") from error
        if rank() > 0:
            return None
        metrics = self._evaluate(rows, result) if self._experiment.evaluate else None
        report = {**self._how(result, before), **_measured(metrics), "edits": len(rows)}
        folder = self._write(rows, result, metrics)
        self._snapshot.unlink(missing_ok=True)
        return {**report, "version": folder}

    def _train(self, rows: Sequence[EditRow], before: Snapshot | None) -> TrainingResult:
        if before:
            _say(f"going on behind epoch {len(before.reports)} of the run that was interrupted")
        with first_process_first():
            self._workbench.prepare_training(self._config)
        # The paper trains prompts only.
        worded = [dataclasses.replace(row, paraphrases=()) for row in rows] if self._experiment.plain else rows
        return self._workbench.train(
            without_contradicted([training_edit(row) for row in worded]),
            self._config,
            start=Start(snapshot=before),
            ranks=self._ranks,
            hooks=Hooks(on_epoch=_say_epoch, on_snapshot=Saver(self._snapshot) if rank() == 0 else _not_here),
        )

    def _evaluate(self, rows: Sequence[EditRow], result: TrainingResult) -> Metrics:
        _say("evaluating")
        return self._workbench.evaluate([evaluation_edit(row) for row in rows], result.tensors, self._config.formats)

    def _how(self, result: TrainingResult, before: Snapshot | None) -> dict[str, Any]:
        seconds = sum(epoch.seconds for epoch in result.epochs)
        earlier = sum(epoch.seconds for epoch in before.reports) if before else 0.0
        return {
            "train_seconds": result.train_s + earlier,
            "epochs": len(result.epochs),
            "loss": [epoch.loss for epoch in result.epochs],
            "tokens_per_second": sum(epoch.tokens for epoch in result.epochs) / max(seconds, 1e-9),
            "peak_memory_bytes": _peak_memory_bytes(self._base.device),
            "stopped": result.stopped.value,
            "steps": result.steps,
            "configuration": self._config.as_record(),
            "model": self._base.name,
            "location": self._base.location,
            "device": str(self._base.device),
            "dtype": str(self._base.model.dtype).removeprefix("torch."),
        }

    def _write(self, rows: Sequence[EditRow], result: TrainingResult, metrics: Metrics | None) -> str:
        store = VersionStore(str(self._experiment.out / "versions"))
        number = max(store.versions(), default=0) + 1
        counts = EditCounts(count=len(rows), added=len(rows), removed=0)
        how = training_record(self._base, self._config, result, counts, processes=processes())
        measured = metrics_record(metrics) if metrics else {}
        info = version_info(self._base, number, parent=None, run=how, metrics=measured)
        trained = [dataclasses.replace(row, paraphrases=()) for row in rows] if self._experiment.plain else rows
        store.write(info, result.tensors, stored_rows(trained))
        return store.folder(number)


def _own_cache() -> Path:
    """The user's, so that what models need once ever is there for the next experiment."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "errata"


def _measured(metrics: Metrics | None) -> dict[str, Any]:
    """What was measured, by name; everything None without metrics. Shares are means over the formats."""
    if metrics is None:
        return dict.fromkeys(("reliability", "generalization", "locality", "perplexity_ratio", "formats"))
    formats = metrics.formats.values()
    general = [found.generalization for found in formats if found.generalization is not None]
    return {
        "reliability": sum(found.reliability for found in formats) / len(formats),
        "generalization": sum(general) / len(general) if general else None,
        "locality": metrics.locality,
        "perplexity_ratio": metrics.perplexity_ratio,
        "formats": {name.value: dataclasses.asdict(found) for name, found in metrics.formats.items()},
    }


def _check_writable(folder: Path) -> None:
    """Raises OSError before hours are spent on a result that cannot be kept."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink()


def _peak_memory_bytes(device: torch.device) -> int:
    """Of all GPUs' allocators, as a model may be spread over them, or of this process."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _not_here(_: object) -> None:
    """The first process keeps the snapshots of all."""


def _say_epoch(epoch: EpochReport) -> None:
    _say(
        f"epoch {epoch.epoch}: loss {epoch.loss:.4f}, {epoch.unlearned} of {epoch.visited} visited unlearned, "
        f"{epoch.steps} steps, {epoch.seconds:.2f} s"
    )


def _say(line: str) -> None:
    if rank() == 0:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
