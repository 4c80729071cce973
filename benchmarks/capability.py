"""Measures what versions of a model can still do: WikiText-2, LAMBADA, HellaSwag, SST-2.

    .venv/bin/python -m benchmarks.capability --model FOLDER --data FOLDER [--delta VERSION ...] [--out TABLE.md]

A delta is a safetensors file of tensors by parameter name, or a version's folder with its `delta.safetensors`. The base
is measured first, and the layers that all versions share run in its row only.
"""

import argparse
import math
import time
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.datasets import SEED, capability_tasks
from benchmarks.report import Machine, markdown_table
from worker.evaluation.capability import ChoiceTask, LastWordTask, Measure, Task, TaskResult, TextTask, measure
from worker.model import BaseModel, load_base
from worker.training.prefix import PrefixCache

# Prefixes of all four tasks are some 0.6 GB of SmolLM2-135M's hidden states; larger models need more to stay warm.
PREFIX_BYTES = 4 << 30


def main() -> None:
    """Measure the base and every delta, and print the table."""
    options = _parser().parse_args()
    machine = Machine()
    torch.set_num_threads(options.threads)
    base = load_base(options.model, options.location)
    tasks = capability_tasks(options.data)
    versions = {"base": base.tuned_tensors()} | {path.name: read_delta(path, base) for path in options.delta}
    prefix = PrefixCache(capacity_bytes=PREFIX_BYTES)
    rows = [[name, *_row(base, tensors, prefix, tasks)] for name, tensors in versions.items()]
    columns = ["version", *(column for task in tasks for column in _columns(task)), "s"]
    lines = [
        "# Capability",
        "",
        f"`benchmarks/capability.py`: {base.path.name}, tuned at {base.location}, {base.model.dtype} on {base.device}; "
        f"rows drawn with seed {SEED}; ± is one standard error. {machine.line()}",
        "",
        markdown_table(columns, rows),
    ]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


def _row(base: BaseModel, tensors: Mapping[str, Tensor], prefix: PrefixCache, tasks: tuple[Task, ...]) -> list[object]:
    started = time.perf_counter()
    shown = track(tasks, "tasks", console=Console(stderr=True), transient=True)
    cells = [cell for task in shown for cell in _cells(measure(base, tensors, prefix, task))]
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
    """A delta's tensors by parameter name. Raises SystemExit if it replaces others than the base's tuned ones."""
    file = path / "delta.safetensors" if path.is_dir() else path
    tensors = safetensors.torch.load_file(file)
    expected = {name: tensor.shape for name, tensor in base.tuned_tensors().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise SystemExit(f"{file} replaces {', '.join(sorted(tensors))}, tuned is {', '.join(sorted(expected))}")
    return tensors


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capability")
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets: see benchmarks/datasets.py")
    parser.add_argument("--delta", type=Path, action="append", default=[], help="version to measure; repeatable")
    parser.add_argument("--location", default="auto", help="tuned module")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    return parser


if __name__ == "__main__":
    main()
