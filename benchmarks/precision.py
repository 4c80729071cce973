"""Measures what bfloat16 and fp32 cost this CPU: the trainer's parts, and vLLM as a node starts it.

    .venv/bin/python -m benchmarks.precision --model FOLDER [--repeats 3]

Record 0032 rests on it. The demo's 20 edits are trained for a few epochs, every batch with its step; vLLM is asked
without the plugin. Both types are taken in turn.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.bench import demo_edits, every_step
from benchmarks.load import Load, ask
from benchmarks.node_cost import TOKEN, plain_vllm
from benchmarks.report import RESULTS, Results, progress, spread, told
from service.nodes import authorization
from worker.checkpoint import resolve_location
from worker.inference.launcher import BASE_MODEL_NAME
from worker.model import BaseModel, freeze_base
from worker.training.breadth_first import train
from worker.training.prefix import PrefixCache
from worker.workbench import training_edit

DTYPES = (torch.bfloat16, torch.float32)
EPOCHS = 4
_TOKENS = 16
_LOADS = {"one at a time": Load(4, 1, _TOKENS), "16 at a time": Load(32, 16, _TOKENS)}


def main() -> None:
    """Measure each part and write the table."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    results = Results(
        options.out,
        "bfloat16 and fp32 on this CPU",
        f"`benchmarks/precision.py`: {told(options)}. Medians, with least and most in brackets; the "
        "ratio is of the medians.",
    )
    results.table(["what", "bfloat16", "fp32", "bfloat16 / fp32"])
    found: dict[str, dict[torch.dtype, list[float]]] = {}
    with progress() as shown:
        task = shown.add_task("runs", total=2 * len(DTYPES) * options.repeats)
        for repeat in range(options.repeats):
            for dtype in DTYPES if repeat % 2 else DTYPES[::-1]:
                for measure in (_trained, _answered):
                    for what, number in measure(options.model, dtype).items():
                        found.setdefault(what, {}).setdefault(dtype, []).append(number)
                    shown.advance(task)
    for what, numbers in found.items():
        results.add(table_row(what, numbers))


def table_row(what: str, numbers: Mapping[torch.dtype, Sequence[float]]) -> list[object]:
    """A row of the table: what was found with each type, and the ratio of the medians."""
    narrow, wide = (statistics.median(numbers[dtype]) for dtype in DTYPES)
    return [what, *(spread(numbers[dtype]) for dtype in DTYPES), narrow / wide]


def _trained(model: Path, dtype: torch.dtype) -> Mapping[str, float]:
    base, cache = _base(model, dtype), PrefixCache()
    edits, config = [training_edit(row) for row in demo_edits()], every_step(EPOCHS)
    began = time.perf_counter()
    train(base, edits, config, prefix=cache)
    cold_s = time.perf_counter() - began
    warm_s = train(base, edits, config, prefix=cache).train_s
    return {"prefix pass over 20 edits, s": cold_s - warm_s, f"{EPOCHS} epochs of 20 edits, s": warm_s}


def _base(model: Path, dtype: torch.dtype) -> BaseModel:
    """The model in this type, whatever the CPU has; see `worker.precision`."""
    return freeze_base(
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        AutoTokenizer.from_pretrained(model),
        location=resolve_location(model, "auto"),
        path=model,
        name=str(model),
        fingerprint=str(dtype),
        dtype=torch.bfloat16,
    )


def _answered(model: Path, dtype: torch.dtype) -> Mapping[str, float]:
    flags = ["--dtype", str(dtype).removeprefix("torch.")]
    rates: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="errata-precision-") as scratch,
        plain_vllm(model, Path(scratch), flags) as server,
    ):
        for what, load in _LOADS.items():
            for _ in range(2):  # the first one warms up
                rates[f"vLLM, {what}, tokens/s"] = _TOKENS * _rate(server.url, load)
    return rates


def _rate(url: str, load: Load) -> float:
    return ask(url, authorization(TOKEN), [BASE_MODEL_NAME], load, prompt="The city lies at a river.").rate


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.precision")
    options.add_argument("--model", required=True, type=Path, help="folder of the base model")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    options.add_argument("--repeats", type=int, default=3, help="repetitions")
    options.add_argument("--out", type=Path, default=RESULTS / "precision.md", help="where the results go")
    return options


if __name__ == "__main__":
    main()
