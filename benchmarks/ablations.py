"""Measures the paper's ablations (arXiv 2509.22072, section 2) in miniature: order of training, and batch size.

    .venv/bin/python -m benchmarks.ablations --model FOLDER --edits zsre.json [--count 100] [--batches 1 10 100]

Breadth-first goes over all edits epoch after epoch; depth-first trains one batch after the other, each until it is
learned or its epochs are used up. Everything else is the paper's: raw format, one threshold on the loss, nothing
preserved, nothing skipped. Two things are not: the learning rate is the small model's, and depth-first judges each
sequence of a batch by itself, where breadth-first goes by the batch's mean. Beside the table, two plots.
"""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence

from benchmarks.bench import QUALITY, Bench, edit_pool, open_bench, parser, quality
from benchmarks.report import Results, progress, spread, told, write_plot
from worker.edit_files import EditRow
from worker.training.config import PLAIN, Pipeline

COLUMNS = ("pipeline", "batch", *QUALITY, "epochs", "steps", "visits per edit", "train s")
PLOTTED = ("reliability raw", "perplexity ratio")


def main() -> None:
    """Measure every combination and write the table."""
    options = _parser().parse_args()
    pool = edit_pool(options.edits, options.count * options.repeats)
    results = Results(
        options.out,
        "Order of training and batch size",
        f"`benchmarks/ablations.py`: {told(options)}. Medians, with least and most in brackets, of {options.repeats} "
        "runs, each on edits of its own; those of a repetition are the same in every row. An epoch of depth-first is "
        "one visit of one batch. Trained raw only, asked in both formats.",
    )
    results.table(COLUMNS)
    series: dict[str, dict[str, list[tuple[float, float]]]] = {column: {} for column in PLOTTED}
    with progress() as shown:
        bench = open_bench(options, options.location, shown)
        for pipeline, batch, runs in ablations(bench, pool, options):
            results.add([pipeline, batch, *(spread(values) for values in zip(*runs, strict=True))])
            results.record(pipeline=pipeline, batch=batch, runs=runs)
            for column, lines in series.items():
                values = [run[QUALITY.index(column)] for run in runs]
                lines.setdefault(str(pipeline), []).extend((batch, value) for value in values if value is not None)
    for column, lines in series.items():
        path = results.plot(column.replace(" ", "-"))
        write_plot(path, lines, title=f"{options.count} edits", x_label="batch size", y_label=column)


def ablations(
    bench: Bench, pool: Sequence[EditRow], options: argparse.Namespace
) -> Iterator[tuple[Pipeline, int, list[list[float | None]]]]:
    """Every pipeline and batch size with the numbers of its runs: the columns of the table behind the batch size."""
    for pipeline in Pipeline:
        for batch in options.batches:
            config = dataclasses.replace(
                PLAIN,
                pipeline=pipeline,
                batch_size=batch,
                learning_rate=options.lr,
                max_epochs=options.max_epochs,
            )
            runs = []
            for repeat in range(options.repeats):
                rows = pool[repeat * options.count : (repeat + 1) * options.count]
                bench.prepare(rows, config)
                result = bench.train(rows, config)
                visits = sum(epoch.visited for epoch in result.epochs) / len(rows)
                cost = [len(result.epochs), result.steps, visits, result.train_s]
                runs.append([*quality(bench.evaluate(rows, result.tensors)), *cost])
            yield pipeline, batch, runs


def _parser() -> argparse.ArgumentParser:
    options = parser("ablations")
    options.add_argument("--count", type=int, default=100, help="edits of a run")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 10, 100], help="batch sizes")
    # What the default model learns 20 edits with to the threshold: benchmarks/results/defaults.md.
    options.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    options.add_argument("--max-epochs", type=int, default=PLAIN.max_epochs, help="of all edits, or of one batch")
    options.add_argument("--repeats", type=int, default=3, help="runs of each combination")
    return options


if __name__ == "__main__":
    main()
