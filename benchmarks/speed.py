"""Measures the time of an epoch against the plain procedure's: same edits, same batches, same steps.

    .venv/bin/python -m benchmarks.speed --model FOLDER --edits zsre.json [--counts 200 1000] [--fp32]

Plain is `benchmarks.baseline.PlainTrainer`: the whole model in fp32 over padded batches. Errata's trainer takes every
step that plain takes: no preservation, no learned sequence left out, no threshold. Both train the raw format. They take
turns epoch by epoch, and who is first changes with every epoch. Beside the table, `speed-COUNT.png` shows the losses.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.progress import Progress

from benchmarks.baseline import PlainTrainer
from benchmarks.bench import Bench, edit_pool, parser
from benchmarks.report import Results, progress, spread, told, write_plot
from worker.edit_files import EditRow
from worker.model import BaseModel, load_base
from worker.training.config import PLAIN, TrainingConfig
from worker.training.encode import TokenSequence
from worker.training.learner import Learner
from worker.training.parallel import Alone

Batches = Sequence[Sequence[TokenSequence]]
PLAIN_NAME = "plain, float32"
COLUMNS = (
    "edits", "trainer", "s an epoch", "times faster than plain", "times faster, pair by pair", "prefix pass, once, s",
    "largest difference of the loss from plain's, %", "last loss",
)  # fmt: skip


@dataclass
class Course:
    """What one trainer did: the seconds and the loss of every epoch, the first of which is a warm-up."""

    prefix_s: float | None = None
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def timed(self) -> list[float]:
        """The seconds of every epoch behind the warm-up."""
        return self.seconds[1:]


def main() -> None:
    """Measure every count and write the table."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    pool = edit_pool(options.edits, max(options.counts))
    config = comparable(options.lr, options.batch)
    results = Results(
        options.out,
        "Time of an epoch",
        f"`benchmarks/speed.py`: {told(options)}. Medians, with least and most in brackets, of {options.repeats} "
        "epochs each, behind one for warming up.",
    )
    results.table(COLUMNS)
    with progress() as shown:
        for count in options.counts:
            plain = load_base(str(options.model), options.location, dtype=torch.float32)
            bases = [load_base(str(options.model), options.location)]
            if options.fp32 and bases[0].model.dtype != torch.float32:
                bases.append(load_base(str(options.model), options.location, dtype=torch.float32))
            ours = {f"Errata, {str(base.model.dtype).removeprefix('torch.')}": base for base in bases}
            courses = race(plain, ours, pool[:count], config, options.repeats, shown)
            for row in table_rows(count, courses):
                results.add(row)
            for name, course in courses.items():
                results.record(edits=count, trainer=name, **vars(course))
            losses = {name: [*enumerate(course.losses, 1)] for name, course in courses.items()}
            write_plot(
                results.plot(str(count)),
                losses,
                title=f"{count} edits, batch {options.batch}, Adam {options.lr:g}",
                x_label="epoch",
                y_label="mean of the batches' losses, nats",
                x_scale="linear",
            )


def comparable(lr: float, batch: int) -> TrainingConfig:
    """A configuration in which Errata's trainer takes every step that plain takes."""
    return dataclasses.replace(PLAIN, learning_rate=lr, batch_size=batch, loss_threshold=0, token_threshold=0)


def race(
    plain: BaseModel,
    ours: Mapping[str, BaseModel],
    rows: Sequence[EditRow],
    config: TrainingConfig,
    repeats: int,
    shown: Progress,
) -> dict[str, Course]:
    """Train the edits with plain, on its base itself, and with Errata's trainer on each of its bases, in turns.

    Returns what each did, plain under `PLAIN_NAME`.
    """
    (parameter,) = plain.parameter_names
    trainer = PlainTrainer(plain.model, parameter, config.learning_rate, loss_threshold=0)
    epochs: dict[str, Callable[[Batches], float]] = {PLAIN_NAME: trainer.epoch}
    courses = {PLAIN_NAME: Course()}
    sequences: list[TokenSequence] = []
    for name, base in ours.items():
        bench = Bench(base, shown)
        courses[name] = Course(prefix_s=bench.prepare(rows, config))
        learner = Learner(base, config, bench.prefix, start=base.tuned_tensors(), factors={}, ranks=Alone())
        epochs[name] = _epoch_of(learner)
        sequences = bench.sequences(rows, config)
    task = shown.add_task(f"{len(rows)} edits", total=(repeats + 1) * len(epochs))
    shuffle = torch.Generator().manual_seed(config.seed)
    for number in range(repeats + 1):
        order = [sequences[place] for place in torch.randperm(len(sequences), generator=shuffle).tolist()]
        batches = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
        # What the first of a pair leaves behind, a warm core or a full cache, is the second's in turn.
        for name in list(epochs)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            courses[name].losses.append(epochs[name](batches))
            courses[name].seconds.append(time.perf_counter() - started)
            shown.advance(task)
    shown.remove_task(task)
    return courses


def table_rows(count: int, courses: Mapping[str, Course]) -> list[list[object]]:
    """The table's rows of one number of edits, plain first."""
    plain = courses[PLAIN_NAME]
    rows: list[list[object]] = []
    for name, course in courses.items():
        pairs = [theirs / own for theirs, own in zip(plain.timed, course.timed, strict=True)]
        apart = max(abs(own - theirs) / theirs for theirs, own in zip(plain.losses, course.losses, strict=True))
        faster = statistics.median(plain.timed) / statistics.median(course.timed)
        compared = [faster, f"{min(pairs):.2f} to {max(pairs):.2f}"] if course is not plain else [None, None]
        difference = 100 * apart if course is not plain else None
        rows.append([count, name, spread(course.timed), *compared, course.prefix_s, difference, course.losses[-1]])
    return rows


def _epoch_of(learner: Learner) -> Callable[[Batches], float]:
    def epoch(batches: Batches) -> float:
        losses = [learner.visit(batch).per_sequence.mean() for batch in batches]
        return torch.stack(losses).mean().item()

    return epoch


def _parser() -> argparse.ArgumentParser:
    options = parser("speed")
    options.add_argument("--counts", type=int, nargs="+", default=[200, 1000], help="sizes of the edit set")
    options.add_argument("--repeats", type=int, default=5, help="timed epochs of each trainer")
    options.add_argument("--batch", type=int, default=20, help="sequences per step")
    options.add_argument("--lr", type=float, default=PLAIN.learning_rate, help="learning rate of both")
    options.add_argument(
        "--fp32", action="store_true", help="measure Errata's trainer in fp32 too, if it is not already"
    )
    return options


if __name__ == "__main__":
    main()
