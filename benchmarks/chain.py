"""Measures warm starts: what one more edit costs on top of many, and what a chain of them does to the weights.

    .venv/bin/python -m benchmarks.chain --model FOLDER --edits zsre.json --edits counterfact.json
        [--live 1000] [--chain 20 --chain-start 50 --chain-step 5]

First `--live` edits are trained from the base; one more is added to them warm, several times with another edit, and
once by a run over all from the base. Then a chain begins at `--chain-start` edits, and each link adds `--chain-step`
to the version before. Every fifth link is compared with a run from the base over the same edits. Beside the tables are
two plots.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench import QUALITY, Bench, edit_pool, open_bench, parser, quality
from benchmarks.report import Results, progress, spread, told, write_plot
from worker.edit_files import EditRow
from worker.training.breadth_first import FROM_BASE, Start, TrainingResult
from worker.training.config import TrainingConfig

ADDED = (
    "run",
    "edits",
    "runs",
    "train s",
    "CPU s",
    "of the full run's CPU",
    "epochs",
    "steps",
    "reliability raw",
    "reliability chat",
)
LINKS = ("links", "edits", "from", *QUALITY, "steps", "train s", "distance")
_COMPARED_EVERY = 5


def main() -> None:
    """Measure both and write the tables."""
    options = _parser().parse_args()
    chained = options.chain_start + options.chain * options.chain_step
    pool = edit_pool(options.edits, max(options.live + options.repeats, chained))
    results = Results(
        options.out,
        "Warm starts",
        f"`benchmarks/chain.py`: {told(options)}. Medians, with least and most in brackets, where a row is of several "
        "runs. The prefix cache is warm. Evaluation asks all edits of a row, in both formats.",
    )
    with progress() as shown:
        bench = open_bench(options, options.location, shown)
        config = dataclasses.replace(bench.usual, max_epochs=options.max_epochs or bench.usual.max_epochs)
        if options.live:
            results.say("## One more edit")
            results.table(ADDED)
            for row in one_more(bench, pool, config, options.live, options.repeats):
                results.add(row)
        results.say("## A chain of warm starts")
        results.say(
            "Steps and seconds of a chain are those of all its links. The distance is the Frobenius norm of the "
            "difference between both versions' tensors, as a share of the norm of what the run from the base changed."
        )
        results.table(LINKS)
        links = []
        for link in chain(bench, pool, config, options.chain_start, options.chain_step, options.chain):
            links.append(link)
            results.add(link)
    for column in ("perplexity ratio", "generalization raw"):
        place = LINKS.index(column)
        series = {
            start: [(link[1], link[place]) for link in links if link[2] == start and link[place] is not None]
            for start in ("chain", "base")
        }
        path = results.plot(column.replace(" ", "-"))
        write_plot(path, series, title="A chain of warm starts", x_label="edits", y_label=column, x_scale="linear")


def one_more(
    bench: Bench, pool: Sequence[EditRow], config: TrainingConfig, live: int, repeats: int
) -> Iterator[list[object]]:
    """Rows of `ADDED`: the live edits, those and one more from the base, and the same warm, with another edit each."""
    rows, more = pool[:live], pool[live : live + repeats]
    bench.prepare([*rows, *more], config)
    version = _run(bench, rows, config)
    yield _added(bench, f"{live} from the base", [version], None)
    full = _run(bench, [*rows, more[0]], config)
    yield _added(bench, "one more, from the base", [full], full.cpu_s)
    warm = [_run(bench, [*rows, row], config, _after(version.result, rows)) for row in more]
    yield _added(bench, "one more, warm", warm, full.cpu_s)


def chain(
    bench: Bench, pool: Sequence[EditRow], config: TrainingConfig, begin: int, step: int, links: int
) -> Iterator[list[Any]]:
    """Rows of `LINKS`: the chain and a run from the base over the same edits, at every fifth link and the last."""
    bench.prepare(pool[: begin + links * step], config)
    start = FROM_BASE
    runs: list[TrainingResult] = []
    for link in range(links + 1):
        rows = pool[: begin + link * step]
        runs.append(bench.train(rows, config, start))
        start = _after(runs[-1], rows)
        if link and (link % _COMPARED_EVERY == 0 or link == links):
            scratch = bench.train(rows, config)
            distance = relative_distance(runs[-1].tensors, scratch.tensors, bench.base.tuned_tensors())
            yield [link, len(rows), "chain", *_quality(bench, rows, runs), distance]
            yield [link, len(rows), "base", *_quality(bench, rows, [scratch]), None]


def relative_distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """The Frobenius norm of left minus right over all tensors, as a share of that of right minus base."""
    return _norm(left, right) / _norm(right, base)


def _norm(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    squares = [(left[name].double().cpu() - right[name].double().cpu()).square().sum() for name in left]
    return torch.stack(squares).sum().sqrt().item()


def _after(result: TrainingResult, rows: Sequence[EditRow]) -> Start:
    return Start(result.tensors, frozenset(row.id for row in rows))


@dataclass(frozen=True)
class _Run:
    """What was trained, how it went, and the CPU time of all threads in seconds."""

    rows: Sequence[EditRow]
    result: TrainingResult
    cpu_s: float


def _run(bench: Bench, rows: Sequence[EditRow], config: TrainingConfig, start: Start = FROM_BASE) -> _Run:
    began = time.process_time()
    result = bench.train(rows, config, start)
    return _Run(rows, result, time.process_time() - began)


def _added(bench: Bench, name: str, runs: Sequence[_Run], full_cpu_s: float | None) -> list[object]:
    asked = [quality(bench.evaluate(run.rows, run.result.tensors, rephrased=False)) for run in runs]
    return [
        name,
        len(runs[0].rows),
        len(runs),
        spread([run.result.train_s for run in runs]),
        spread([run.cpu_s for run in runs]),
        spread([run.cpu_s / full_cpu_s for run in runs]) if full_cpu_s else None,
        spread([len(run.result.epochs) for run in runs]),
        spread([run.result.steps for run in runs]),
        *(spread(shares) for shares in list(zip(*asked, strict=True))[:2]),
    ]


def _quality(bench: Bench, rows: Sequence[EditRow], runs: Sequence[TrainingResult]) -> list[float | None]:
    """The last run's quality, and the steps and seconds of all."""
    metrics = bench.evaluate(rows, runs[-1].tensors)
    return [*quality(metrics), sum(run.steps for run in runs), sum(run.train_s for run in runs)]


def _parser() -> argparse.ArgumentParser:
    options = parser("chain")
    options.add_argument("--live", type=int, default=1000, help="edits that one more is added to; 0: the chain only")
    options.add_argument("--repeats", type=int, default=3, help="edits that are added to them, one at a time")
    options.add_argument("--chain", type=int, default=20, help="links of the chain")
    options.add_argument("--chain-start", type=int, default=50, help="edits that the chain begins with")
    options.add_argument("--chain-step", type=int, default=5, help="edits that each link adds")
    options.add_argument("--max-epochs", type=int, help="bound on epochs")
    return options


if __name__ == "__main__":
    main()
