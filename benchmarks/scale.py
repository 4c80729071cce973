"""Measures time and memory against the number of edits, each number in a process of its own.

    .venv/bin/python -m benchmarks.scale --model FOLDER --edits counterfact-edit.json --edits counterfact-train.json
        [--counts 1000 3000 10000]

Several files are taken in turns; a prompt's later edit supersedes its earlier ones. Beside the table, `scale-time.png`
and `scale-memory.png`. A process whose number is measured prints its figures as one line of JSON.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from benchmarks.bench import Bench, edit_pool, open_bench, parser, peak_rss_bytes, quality, sample
from benchmarks.report import Results, progress, told, write_plot
from service.defaults import PREFIX_CACHE_BYTES
from worker.edit_files import EditRow
from worker.training.config import TrainingConfig

SAMPLE = 500
COLUMNS = (
    "edits", "prefix pass s", "train s", "CPU s", "CPU ms an edit", "epochs", "visits per sequence", "reliability raw",
    "reliability chat", "peak GiB", "with the model loaded GiB", "cache on disk GiB", "cache's bound GiB", "rest GiB",
)  # fmt: skip


def main() -> None:
    """Measure every count and write the table; or, as a child, measure one."""
    options = _parser().parse_args()
    if options.child:
        with progress() as shown:
            bench = open_bench(options, options.location, shown, prefix_bytes=PREFIX_CACHE_BYTES)
            loaded = psutil.Process().memory_info().rss
            rows = edit_pool(options.edits, options.child)[: options.child]
            print(json.dumps(measured(bench, rows, bench.usual, loaded)))
        return
    results = Results(
        options.out,
        "Time and memory against the number of edits",
        f"`benchmarks/scale.py`: {told(options)}. One run a row, in a process of its own, so its spread is not known. "
        "Training is told without the prefix pass, which is cold and happens once ever; its CPU time "
        "is the process's, and says more than the clock where other work shares the cores. "
        f"Reliability is that of {SAMPLE} edits, the same each time. The peak is the process's before it is asked "
        "anything; it is what it held with the model loaded, the prefix cache's file, which is mapped and never larger "
        "than its bound and holds the calibration text's states too, and the rest.",
    )
    results.table(COLUMNS)
    found = []
    with progress() as shown:
        for count in shown.track(options.counts, description="sizes"):
            found.append(_in_child(count))
            results.add(table_row(found[-1]))
            results.record(**found[-1])
    results.say("## Sequences visited in each epoch")
    results.say("\n".join(f"- {one['edits']} edits: {' '.join(map(str, one['visited']))}" for one in found))
    per_edit = [(one["edits"], _ms_an_edit(one)) for one in found]
    peaks = [(one["edits"], one["peak_bytes"] / 2**30) for one in found]
    for name, points, label in (("time", per_edit, "CPU ms an edit"), ("memory", peaks, "peak memory, GiB")):
        write_plot(results.plot(name), {label: points}, title="Training", x_label="edits", y_label=label)


def measured(bench: Bench, rows: Sequence[EditRow], config: TrainingConfig, loaded_bytes: int) -> dict[str, Any]:
    """Train the edits from a cold prefix cache as large as a worker's; figures in seconds and bytes."""
    prefix_s = bench.prepare(rows, config)
    began = time.process_time()
    result = bench.train(rows, config)
    cpu_s = time.process_time() - began
    peak = peak_rss_bytes()
    asked = quality(bench.evaluate(sample(rows, SAMPLE), result.tensors, rephrased=False))
    return {
        "edits": len(rows),
        "prefix_s": prefix_s,
        "train_s": result.train_s,
        "cpu_s": cpu_s,
        "visited": [epoch.visited for epoch in result.epochs],
        "sequences": result.epochs[-1].sequences,
        "reliability": asked[:2],
        "peak_bytes": peak,
        "loaded_bytes": loaded_bytes,
        "cache_bytes": sum(
            file.stat().st_blocks * 512 for file in (bench.folder / "prefix").rglob("*") if file.is_file()
        ),
    }


def table_row(one: Mapping[str, Any]) -> list[object]:
    """A row of the table from what a child measured."""
    peak, loaded, cache, bound = (
        size / 2**30 for size in (one["peak_bytes"], one["loaded_bytes"], one["cache_bytes"], PREFIX_CACHE_BYTES)
    )
    visits = sum(one["visited"]) / one["sequences"]
    return [
        one["edits"],
        one["prefix_s"],
        one["train_s"],
        one["cpu_s"],
        _ms_an_edit(one),
        len(one["visited"]),
        visits,
        *one["reliability"],
        peak,
        loaded,
        cache,
        bound,
        peak - loaded - cache,
    ]


def _ms_an_edit(one: Mapping[str, Any]) -> float:
    return float(1000 * one["cpu_s"] / one["edits"])


def _in_child(count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale", *sys.argv[1:], "--child", str(count)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _parser() -> argparse.ArgumentParser:
    options = parser("scale")
    options.add_argument("--counts", type=int, nargs="+", default=[1000, 3000, 10_000], help="sizes of the edit set")
    options.add_argument("--child", type=int, help="measure this number here; for the script itself")
    return options


if __name__ == "__main__":
    main()
