"""Measures what versions of a model can still do: WikiText-2, LAMBADA, HellaSwag, SST-2.

    .venv/bin/python -m benchmarks.capability --model FOLDER --data FOLDER [--delta VERSION ...]

A delta is a version's folder, verified as a node verifies it, or a bare safetensors file of tensors by parameter name,
which has no manifest to be verified by. The base is measured first, and the layers that all versions share run in its
row only.
"""

import argparse
import math
import time
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from rich.progress import Progress
from torch import Tensor

from benchmarks.datasets import SEED, capability_tasks
from benchmarks.report import RESULTS, Results, progress, told
from service.manifest import version_of_folder
from worker.delta import DeltaError, VersionStore
from worker.evaluation.capability import ChoiceTask, LastWordTask, Measure, Task, TaskResult, TextTask, measure
from worker.model import BaseModel, load_base
from worker.training.prefix import PrefixCache

# Prefixes of all four tasks are some 0.6 GB of SmolLM2-135M's hidden states; larger models need more to stay warm.
PREFIX_BYTES = 4 << 30


def main() -> None:
    """Measure the base and every delta, and write the table."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    base = load_base(str(options.model), options.location)
    tasks = capability_tasks(options.data)
    versions = {"base": base.tuned_tensors()} | {path.name: read_delta(path, base) for path in options.delta}
    prefix = PrefixCache(capacity_bytes=PREFIX_BYTES)
    results = Results(
        options.out,
        "Capability",
        f"`benchmarks/capability.py`: {told(options)}; tuned at {base.location}, {base.model.dtype} on {base.device}; "
        f"rows drawn with seed {SEED}; ± is one standard error.",
    )
    results.table(["version", *(column for task in tasks for column in _columns(task)), "s"])
    with progress() as shown:
        for name, tensors in versions.items():
            results.add([name, *_row(base, tensors, prefix, tasks, shown)])


def _row(
    base: BaseModel, tensors: Mapping[str, Tensor], prefix: PrefixCache, tasks: tuple[Task, ...], shown: Progress
) -> list[object]:
    started = time.perf_counter()
    measured = (measure(base, tensors, prefix, task) for task in shown.track(tasks, description="tasks"))
    cells = [cell for result in measured for cell in _cells(result)]
    return [*cells, round(time.perf_counter() - started)]


def _columns(task: Task) -> list[str]:
    """The columns of one task, as `_cells` fills them."""
    match task:
        case TextTask():
            return [f"{task.name} perplexity (window {task.window_tokens})"]
        case ChoiceTask():
            return [f"{task.name} {kind}" for kind in (Measure.ACCURACY, Measure.NORMALISED_ACCURACY)]
        case LastWordTask():
            return [f"{task.name} {Measure.ACCURACY}"]


def _cells(result: TaskResult) -> list[str]:
    return [_with_error(kind, value, result.items) for kind, value in result.values.items()]


def _with_error(kind: Measure, value: float, items: int) -> str:
    if kind is Measure.PERPLEXITY:
        return f"{value:.3f}"
    return f"{value:.3f} ± {math.sqrt(value * (1 - value) / items):.3f}"


def read_delta(path: Path, base: BaseModel) -> dict[str, Tensor]:
    """A delta's tensors by parameter name. Raises SystemExit if it is damaged, or not for the base's tuned tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in base.tuned_tensors().items()}
    if path.is_dir():
        return _read_version(path.absolute(), base.fingerprint, shapes)
    tensors = safetensors.torch.load_file(path)
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        raise SystemExit(f"{path} replaces {', '.join(sorted(tensors))}, tuned is {', '.join(sorted(shapes))}")
    return tensors


def _read_version(folder: Path, fingerprint: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    store, version = VersionStore(str(folder.parent)), version_of_folder(folder.name)
    if version is None or store.folder(version) != str(folder):
        raise SystemExit(f"{folder} is no folder of a version")
    try:
        return store.load(version, fingerprint=fingerprint, shapes=shapes)
    except DeltaError as error:
        raise SystemExit(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capability")
    parser.add_argument("--model", required=True, type=Path, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets: see benchmarks/datasets.py")
    parser.add_argument("--delta", type=Path, action="append", default=[], help="version to measure; repeatable")
    parser.add_argument("--location", default="auto", help="tuned module")
    parser.add_argument("--out", type=Path, default=RESULTS / "capability.md", help="where the results go")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    return parser


if __name__ == "__main__":
    main()
