"""Measures what edits cost the rest of the model: configurations of the trainer, each run to its natural stop.

    .venv/bin/python -m benchmarks.frontier --model FOLDER --edits zsre.json --edits counterfact.json --data FOLDER
        [--counts 20 100 1000] [--preserve 0 0.1] [--lrs 1e-2] [--batches 20] [--locations auto] [--plain [LR ...]]
        [--tasks WikiText-2 LAMBADA] [--visit-all]

Every combination of the options is a configuration, and its edits are trained and asked raw and as chat. A row's
capability is told against the base's, which is measured first in the same run; `--data` is the folder that
benchmarks/datasets.py describes. Beside the table, two plots show reliability and generalization against perplexity.
"""

import argparse
import dataclasses
import gc
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from benchmarks.bench import QUALITY, Bench, edit_pool, forget_peak, open_bench, parser, peak_rss_bytes, quality, sample
from benchmarks.datasets import TASKS, capability_tasks
from benchmarks.report import Results, progress, spread, told, write_plot
from worker.edit_files import EditRow
from worker.evaluation.capability import Measure, Task, TextTask, measure
from worker.training.config import TrainingConfig, config_for

COST = ("epochs", "steps", "visits per sequence", "train s", "peak GiB")
# The option of each and what it is a grid of.
_AXES = {
    "lrs": "learning_rate",
    "batches": "batch_size",
    "preserve": "preserve",
    "decays": "decay",
    "loss_thresholds": "loss_threshold",
    "token_thresholds": "token_threshold",
    "random_prefixes": "random_prefixes",
}


@dataclass(frozen=True)
class Setting:
    """One configuration; `name` says in what it differs from the usual one."""

    name: str
    config: TrainingConfig


def main() -> None:
    """Run every configuration that the command line asks for."""
    options = _parser().parse_args()
    pool = edit_pool(options.edits, max(options.counts) * options.repeats)
    tasks = capability_tasks(options.data, options.tasks)
    results = Results(
        options.out,
        "Configurations of the trainer",
        f"`benchmarks/frontier.py`: {told(options)}. Shares from 0 to 1; the perplexity ratio is over the shipped "
        "passages. WikiText-2 is a ratio to the base's perplexity, the accuracies are differences from the base's in "
        f"points. {_repetition(options.repeats)} Seconds are a run's with a warm prefix cache; the peak is the "
        "process's while it trains, what it has mapped of the cache's file included.",
    )
    results.table(["edits", "location", "configuration", *QUALITY, *map(_column, tasks), *COST, "stopped"])
    points: dict[str, dict[str, list[tuple[float, float | None]]]] = {"reliability": {}, "generalization": {}}
    with progress() as shown:
        for location in options.locations:
            bench = open_bench(options, location, shown)
            base = capability(bench, bench.base.tuned_tensors(), tasks)
            results.record(location=bench.base.location, base=base)
            for setting, count in itertools.product(settings(options, bench), options.counts):
                runs = []
                for repeat in range(options.repeats):
                    rows = pool[repeat * count : (repeat + 1) * count]
                    asked = sample(rows, options.eval_sample)
                    name = f"{bench.base.location}-{setting.name}-{count}-{repeat}".replace(" ", "_")
                    save = options.save and options.save / f"{name}.safetensors"
                    runs.append(run(bench, setting.config, rows, asked, tasks, base, save))
                    results.record(edits=count, setting=setting.name, repeat=repeat, **vars(runs[-1]))
                row = [spread(column) for column in zip(*(one.values for one in runs), strict=True)]
                stopped = ", ".join(sorted({one.stopped for one in runs}))
                results.add([count, bench.base.location, setting.name, *row, stopped])
                method = f"{bench.base.location}: {setting.name}"
                for kind, series in points.items():
                    series.setdefault(method, []).extend(one.point(kind) for one in runs)
            del bench
            gc.collect()
    for kind, series in points.items():
        title = f"{kind}, mean of the formats, {' '.join(map(str, options.counts))} edits"
        known = {name: [(x, y) for x, y in found if y is not None] for name, found in series.items()}
        path = results.plot(kind)
        write_plot(path, known, title=title, x_label="perplexity, ratio to the base's", y_label=kind, x_scale="linear")


@dataclass(frozen=True)
class Outcome:
    """What one run came to: its numeric columns, and why it ended."""

    values: Sequence[float | None]
    stopped: str

    def point(self, kind: str) -> tuple[float, float | None]:
        """The perplexity ratio and the mean over formats of reliability or generalization."""
        named = dict(zip(QUALITY, self.values, strict=False))
        shares = [value for name, value in named.items() if name.startswith(kind) and value is not None]
        return float(named["perplexity ratio"] or 0), sum(shares) / len(shares) if shares else None


def run(
    bench: Bench,
    config: TrainingConfig,
    rows: Sequence[EditRow],
    asked: Sequence[EditRow],
    tasks: Sequence[Task],
    base: Mapping[str, float],
    save: Path | None,
) -> Outcome:
    """Train `rows`, ask `asked`, and compare capability with the `base`'s."""
    bench.prepare(rows, config)
    forget_peak()
    result = bench.train(rows, config)
    peak = peak_rss_bytes() / 2**30
    if save:
        save.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(dict(result.tensors), save)
    metrics = bench.evaluate(asked, result.tensors)
    after = capability(bench, result.tensors, tasks)
    changes = [
        after[task.name] / base[task.name] if isinstance(task, TextTask) else 100 * (after[task.name] - base[task.name])
        for task in tasks
    ]
    visits = sum(epoch.visited for epoch in result.epochs) / result.epochs[-1].sequences
    cost = [len(result.epochs), result.steps, visits, result.train_s, peak]
    return Outcome([*quality(metrics), *changes, *cost], str(result.stopped))


def capability(bench: Bench, tensors: Mapping[str, Tensor], tasks: Sequence[Task]) -> dict[str, float]:
    """Perplexity of a text, accuracy of any other task, by the task's name."""
    found: dict[str, float] = {}
    for task in tasks:
        shown = bench.progress.add_task(task.name, total=None)
        kind = Measure.PERPLEXITY if isinstance(task, TextTask) else Measure.ACCURACY
        found[task.name] = measure(bench.base, tensors, bench.prefix, task).values[kind]
        bench.progress.remove_task(shown)
    return found


def settings(options: argparse.Namespace, bench: Bench) -> Iterator[Setting]:
    """Every combination of the options, then the paper's procedure, in all formats as well."""
    usual = bench.usual
    usual = dataclasses.replace(usual, max_epochs=options.max_epochs or usual.max_epochs)
    axes = {name: getattr(options, axis) for axis, name in _AXES.items() if getattr(options, axis)}
    for values in itertools.product(*axes.values()):
        yield _setting("defaults", usual, dict(zip(axes, values, strict=True)))
    if options.visit_all:
        yield _setting("defaults", usual, {"skip_learned": False})
    if options.plain is not None:
        plain = dataclasses.replace(config_for(bench.base.model.config.to_dict(), plain=True), formats=None)
        for lr in options.plain or [plain.learning_rate]:
            yield _setting("plain", plain, {"learning_rate": lr})


def _setting(name: str, usual: TrainingConfig, given: Mapping[str, Any]) -> Setting:
    config = dataclasses.replace(usual, **given)
    other = [f"{key} {value:g}" for key, value in given.items() if value != getattr(usual, key)]
    return Setting(", ".join([name, *other]), config)


def _column(task: Task) -> str:
    return f"{task.name} {'ratio' if isinstance(task, TextTask) else 'points'}"


def _repetition(repeats: int) -> str:
    if repeats == 1:
        return "One run a row, so its spread is not known."
    return f"Medians, with least and most in brackets, of {repeats} runs, each on edits of its own."


def _parser() -> argparse.ArgumentParser:
    options = parser("frontier", one_location=False)
    options.add_argument("--data", type=Path, required=True, help="folder of the data sets: see benchmarks/datasets.py")
    options.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="measures of capability")
    options.add_argument("--counts", type=int, nargs="+", default=[20, 100, 1000], help="sizes of the edit set")
    options.add_argument("--locations", nargs="+", default=["auto"], help="tuned locations")
    options.add_argument("--lrs", type=float, nargs="+", help="learning rates")
    options.add_argument("--batches", type=int, nargs="+", help="batch sizes")
    options.add_argument("--preserve", type=float, nargs="+", help="strengths of preservation, 0 for none")
    options.add_argument("--decays", type=float, nargs="+", help="of the update")
    options.add_argument("--loss-thresholds", type=float, nargs="+", help="nats")
    options.add_argument("--token-thresholds", type=float, nargs="+", help="nats; inf for none")
    options.add_argument("--random-prefixes", type=int, nargs="+", help="copies of a prompt behind random words")
    options.add_argument("--visit-all", action="store_true", help="every epoch over all edits too, learned or not")
    options.add_argument("--max-epochs", type=int, help="bound on epochs, not of plain runs")
    options.add_argument("--plain", type=float, nargs="*", metavar="LR", help="the paper's procedure too, at each rate")
    options.add_argument("--repeats", type=int, default=1, help="runs of each configuration, each on its own edits")
    options.add_argument("--eval-sample", type=int, default=0, help="edits of a run that are asked; 0: all")
    options.add_argument("--save", type=Path, help="folder to keep the deltas in, as safetensors")
    return options


if __name__ == "__main__":
    main()
