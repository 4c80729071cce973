"""One training from a file of edits to a version folder and its measures, without the service.

It joins the same parts as `worker.run` does, for a caller who has a file instead of a queue.
"""

import dataclasses
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from worker.delta import Base, VersionInfo, VersionStore
from worker.edit_files import EditRow, read_edits
from worker.evaluation.metrics import EvaluationEdit, Evaluator, Metrics
from worker.model import BaseModel, load_base
from worker.placement import DeviceMap
from worker.training import snapshot as snapshots
from worker.training.breadth_first import Hooks, Start, TrainingResult, train
from worker.training.config import TrainingConfig, config_for
from worker.training.encode import TrainingEdit
from worker.training.parallel import Alone, DataParallel
from worker.training.prefix import DEFAULT_CAPACITY_BYTES, PrefixCache
from worker.training.preserve import Preservation
from worker.training.snapshot import EpochReport, Saver, Snapshot, SnapshotMismatchError

_LONGEST_WAIT = timedelta(hours=2)  # for a process that measures what is to be preserved, or loads a model


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
    cache_bytes: int = DEFAULT_CAPACITY_BYTES
    evaluate: bool = True


def rank() -> int:
    """This process's number among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def carry_out(experiment: Experiment) -> dict[str, Any] | None:
    """Train, write the version, measure it; JSON values that say how it went. None in every process but the first.

    Raises what its parts do: EditFileError, CheckpointError, ValueError, DeltaError, TrainingError,
    SnapshotMismatchError, OSError.
    """
    rows = read_edits(experiment.edits)[: experiment.limit]
    _check_writable(experiment.out)
    base = load_base(
        experiment.model,
        experiment.location,
        device=_own_device(experiment.device),
        dtype=experiment.dtype,
        device_map=experiment.device_map,
    )
    usual = config_for(base.model.config.to_dict(), plain=experiment.plain)
    config = dataclasses.replace(usual, **experiment.changes)
    if processes() > 1:
        if base.device.type == "cuda":
            torch.cuda.set_device(base.device)  # what NCCL and pinned memory go by
        distributed.init_process_group("nccl" if base.device.type == "cuda" else "gloo", timeout=_LONGEST_WAIT)
    try:
        return _Bench(experiment, base, config).carry_out(rows)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


class _Bench:
    """A loaded model, how it is trained, and where its results go."""

    def __init__(self, experiment: Experiment, base: BaseModel, config: TrainingConfig) -> None:
        self._experiment = experiment
        self._base = base
        self._config = config
        self._cache = experiment.cache or _own_cache()
        self._prefix = PrefixCache(self._cache / "prefix", experiment.cache_bytes)
        # The seed is part of the name: a snapshot carries its run's, and would go on with it.
        self._snapshot = experiment.out / f"interrupted-{config.seed}.safetensors"

    def carry_out(self, rows: Sequence[EditRow]) -> dict[str, Any] | None:
        before = snapshots.load(self._snapshot)
        try:
            result = self._train(rows, before)
        except SnapshotMismatchError as error:
            hint = "remove it, or name another folder for other arguments"
            raise SnapshotMismatchError(f"{self._snapshot}: {error}; {hint}") from error
        if rank() > 0:
            return None
        metrics = _measured(self._evaluate(rows, result) if self._experiment.evaluate else None)
        how = self._how(result, before)
        path = self._write(rows, result, how, metrics)
        self._snapshot.unlink(missing_ok=True)
        return {**how, **metrics, "edits": len(rows), "version": str(path)}

    def _train(self, rows: Sequence[EditRow], before: Snapshot | None) -> TrainingResult:
        if before:
            _say(f"going on behind epoch {len(before.reports)} of the run that was interrupted")
        paraphrased = not self._experiment.plain  # the paper trains prompts only
        edits = [TrainingEdit(row.id, row.prompt, row.target, row.paraphrases if paraphrased else ()) for row in rows]
        return train(
            self._base,
            edits,
            self._config,
            prefix=self._prefix,
            factors=self._factors(),
            start=Start(snapshot=before),
            ranks=DataParallel() if distributed.is_initialized() else Alone(),
            hooks=Hooks(on_epoch=_say_epoch, on_snapshot=Saver(self._snapshot) if rank() == 0 else _not_here),
        )

    def _factors(self) -> dict[str, torch.Tensor] | None:
        if not self._config.preserve:
            return None
        if rank() > 0:
            # The first process measures and keeps; the others read what it kept.
            distributed.barrier()
        factors = Preservation(self._base, self._prefix, self._cache).factors(self._config.preserve)
        if rank() == 0 and distributed.is_initialized():
            distributed.barrier()
        return dict(factors)

    def _evaluate(self, rows: Sequence[EditRow], result: TrainingResult) -> Metrics:
        _say("evaluating")
        edits = [EvaluationEdit(row.id, row.prompt, row.target, row.rephrases) for row in rows]
        return Evaluator(self._base, prefix=self._prefix).evaluate(edits, result.tensors, self._config.formats)

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

    def _write(
        self, rows: Sequence[EditRow], result: TrainingResult, how: dict[str, Any], metrics: dict[str, Any]
    ) -> Path:
        store = VersionStore(str(self._experiment.out))
        number = max(store.versions(), default=0) + 1
        info = VersionInfo(
            version=number,
            parent=None,
            base=Base(name=self._base.name, fingerprint=self._base.fingerprint),
            location=self._base.location,
            run=how,
            metrics=metrics,
            created_at=int(time.time()),
        )
        store.write(info, result.tensors, [_stored(row) for row in rows])
        return self._experiment.out / "versions" / f"{number:06d}"


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


def _stored(row: EditRow) -> dict[str, Any]:
    return {**dataclasses.asdict(row), "rephrases": list(row.rephrases), "paraphrases": list(row.paraphrases)}


def _check_writable(folder: Path) -> None:
    """Raises OSError before hours are spent on a result that cannot be kept."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink()


def _own_device(asked: str | None) -> str | None:
    """What is asked for; of several processes that may use GPUs, each has one of its own."""
    shares = processes() > 1 and asked in (None, "cuda") and torch.cuda.is_available()
    return f"cuda:{os.environ['LOCAL_RANK']}" if shares else asked


def _peak_memory_bytes(device: torch.device) -> int:
    """Of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
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
