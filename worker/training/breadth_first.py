"""The training loop: LocFT-BF (arXiv 2509.22072) over a cumulative edit set, from the base or from a version.

Takes objects and returns objects: no files, no stores, no clock but a stopwatch.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from worker.model import BaseModel
from worker.training.calibration import random_prefixes
from worker.training.config import Pipeline, TrainingConfig
from worker.training.encode import Encoder, TokenSequence, TrainingEdit, supported_formats
from worker.training.learner import Learner, Losses
from worker.training.parallel import Alone, Ranks
from worker.training.prefix import PrefixCache
from worker.training.preserve import Factors
from worker.training.schedule import schedule
from worker.training.score import score
from worker.training.snapshot import EpochReport, Snapshot, SnapshotMismatchError, identity
from worker.training.sweeps import Sweeps


class TrainingError(RuntimeError):
    """A run ended without a result."""


class TrainingDivergedError(TrainingError):
    """The loss is not a number any more; nothing of the run is usable. `edit_ids` are those whose loss was none."""

    def __init__(self, message: str, edit_ids: frozenset[str]) -> None:
        super().__init__(message)
        self.edit_ids = edit_ids


class TrainingCancelledError(TrainingError):
    """The caller asked the run to stop."""


class StopReason(StrEnum):
    """Why a run's loop ended."""

    LEARNED = "learned"
    BUDGET_SPENT = "budget_spent"


@dataclass(frozen=True)
class Start:
    """Where a run starts; by default from the base, with nothing learned.

    `tensors` are a version's, by parameter name, and `learned` the ids of the edits that it contains. `snapshot` is
    what an interrupted run of the same arguments left; edits may have been added at the end since.
    """

    tensors: Mapping[str, Tensor] | None = None
    learned: frozenset[str] = frozenset()
    snapshot: Snapshot | None = None


FROM_BASE = Start()


def _nothing(_: object) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """What a run tells its caller and asks of it.

    `on_epoch` is called after every epoch; `on_snapshot` too, unless that epoch was the last, with a function that
    takes a snapshot (a copy of three times the tuned tensors); `should_stop` is asked before every batch; `arrivals` is
    asked before every epoch for edits that join the run.
    """

    on_epoch: Callable[[EpochReport], None] = _nothing
    on_snapshot: Callable[[Callable[[], Snapshot]], None] = _nothing
    should_stop: Callable[[], bool] = lambda: False
    arrivals: Callable[[], Sequence[TrainingEdit]] = tuple


@dataclass(frozen=True)
class TrainingResult:
    """The tuned tensors by parameter name (in a version's dtype, on the CPU) and how they came about.

    `tokens` is the length of all sequences together; an epoch reports how many of them it computed.
    """

    tensors: Mapping[str, Tensor]
    epochs: tuple[EpochReport, ...]
    stopped: StopReason
    steps: int
    tokens: int
    train_s: float


def train(
    base: BaseModel,
    edits: Sequence[TrainingEdit],
    config: TrainingConfig,
    *,
    prefix: PrefixCache,
    factors: Factors | None = None,
    start: Start = FROM_BASE,
    ranks: Ranks | None = None,
    hooks: Hooks | None = None,
) -> TrainingResult:
    """Learn all `edits` together. The base's own weights stay as they are.

    The same arguments give the same tensors to the last bit on the same machine; on a GPU while no sequence is longer
    than 64 tokens. Over more keys the backward of torch's memory-efficient attention may add in any order.

    Args:
        base: the frozen model.
        edits: the whole edit set; their order has no meaning, but the result depends on it.
        config: see `TrainingConfig`.
        prefix: kept by the caller between runs.
        factors: the preservation's, for a configuration with `preserve`.
        start: see `Start`.
        ranks: the other processes of a data-parallel run.
        hooks: see `Hooks`.

    Raises:
        EncodingError: an edit cannot be trained on; it names the edit.
        SnapshotMismatchError: the snapshot is of a run of other arguments.
        TrainingDivergedError: the loss is not finite.
        TrainingCancelledError: `should_stop` said so.
    """
    started = time.perf_counter()
    if bool(config.preserve) != bool(factors):
        raise ValueError("factors are needed if, and only if, the configuration preserves")
    hooks = hooks or Hooks()
    run = _Run(base, config, prefix, factors or {}, start, ranks or Alone())
    run.join(edits)
    if not run.sequences:
        raise ValueError("a run needs at least one edit")
    if start.snapshot:
        run.restore(start.snapshot)
    learned = False
    while not run.spent:
        run.join(hooks.arrivals())
        hooks.on_epoch(run.epoch(hooks.should_stop))
        if learned := run.learned(hooks.should_stop):
            break
        hooks.on_snapshot(run.snapshot)
    return TrainingResult(
        tensors={name: tensor.to("cpu", copy=True) for name, tensor in run.learner.tensors().items()},
        epochs=tuple(run.reports),
        stopped=StopReason.LEARNED if learned else StopReason.BUDGET_SPENT,
        steps=run.steps,
        tokens=sum(len(sequence.token_ids) for sequence in run.sequences),
        train_s=time.perf_counter() - started,
    )


class _Run:
    """The state of a run: its sequences, which of them are learned, the learner and the epochs so far."""

    def __init__(
        self, base: BaseModel, config: TrainingConfig, prefix: PrefixCache, factors: Factors, start: Start, ranks: Ranks
    ) -> None:
        self._base = base
        self._config = config
        self._prefix = prefix
        self._start = start.tensors or base.tuned_tensors()
        self._known = start.learned
        self._ranks = ranks
        self._shuffle = torch.Generator().manual_seed(config.seed)
        self._schedule = schedule(config, self._shuffle)
        self._encoder = Encoder(
            base.tokenizer,
            config.formats or supported_formats(base.tokenizer),
            max_tokens=config.max_tokens,
            random_prefixes=random_prefixes(config.random_prefixes),
        )
        self.learner = Learner(base, config, prefix, start=self._start, factors=factors, ranks=ranks)
        self.sequences: list[TokenSequence] = []
        self._edit_ids: list[str] = []  # of each sequence
        self.reports: list[EpochReport] = []
        self._filled = 0  # sequences whose prefix was looked after
        self._sweeps = Sweeps(config)

    def join(self, edits: Sequence[TrainingEdit]) -> None:
        learned: list[bool] = []
        for edit in edits:
            sequences = self._encoder.encode(edit)
            self.sequences += sequences
            self._edit_ids += [edit.id] * len(sequences)
            learned += [edit.id in self._known] * len(sequences)
        if learned:
            self._schedule.join(learned)
            self._sweeps.join(len(learned))

    @property
    def steps(self) -> int:
        """The steps taken so far."""
        return sum(report.steps for report in self.reports)

    @property
    def spent(self) -> bool:
        """Whether the budget is used up."""
        return self._progress >= 1

    @property
    def _progress(self) -> float:
        """Which part of the budget is used up, 1 for all of it; it begins anew when edits join.

        Depth-first has a budget for each batch, not for the run.
        """
        if self._config.pipeline == Pipeline.DEPTH_FIRST:
            return float(self._schedule.finished)
        reports = [report for report in self.reports if report.sequences == len(self.sequences)]
        batches = sum(report.batches for report in reports)
        by_visits = sum(report.visited for report in reports) / (self._config.max_epochs * len(self.sequences))
        return min(by_visits, batches / self._config.min_steps) if self._config.min_steps else by_visits

    def epoch(self, should_stop: Callable[[], bool]) -> EpochReport:
        """Visit what the schedule says; tells it what was found."""
        started = time.perf_counter()
        self._prefix.fill(self._base, self._ranks.share(self.sequences[self._filled :]), should_stop)
        self._filled = len(self.sequences)
        self.learner.slow_down(self._progress, at_most=math.sqrt(self._schedule.replayed))
        batches = self._schedule.epoch()
        visits: list[Losses] = []
        for batch in batches:
            if should_stop():
                raise TrainingCancelledError(f"cancelled in epoch {len(self.reports) + 1}")
            sequences = [self.sequences[number] for number in batch]
            visits.append(self.learner.visit(sequences, share=len(batch) / len(self.sequences)))
        numbers = [number for batch in batches for number in batch]
        mean, worst, steps = self._outcome(numbers, visits)
        unlearned = self._mark(numbers, mean, worst)
        report = EpochReport(
            epoch=len(self.reports) + 1,
            loss=mean.mean().item(),
            worst_token_loss=worst.max().item(),
            sequences=len(self.sequences),
            visited=len(numbers),
            unlearned=unlearned,
            batches=len(batches),
            steps=steps,
            tokens=sum(len(self.sequences[number].token_ids) for number in numbers),
            seconds=time.perf_counter() - started,
            budget=0.0,
        )
        self.reports.append(report)
        self.reports[-1] = dataclasses.replace(report, budget=min(1.0, self._progress))
        return self.reports[-1]

    def learned(self, should_stop: Callable[[], bool]) -> bool:
        """Whether all sequences are, judged as the configuration says."""
        if self._config.judges_sequences:

            def check(numbers: Sequence[int]) -> int:
                if should_stop():
                    raise TrainingCancelledError(f"cancelled behind epoch {len(self.reports)}")
                return self._check(numbers)

            return self._schedule.finished and self._sweeps.sweep(self.steps, check)
        last = self.reports[-1]
        return last.loss < self._config.loss_threshold and last.worst_token_loss < self._config.token_threshold

    def snapshot(self) -> Snapshot:
        return Snapshot(
            tensors={
                **self.learner.state(),
                **self._sweeps.state(),
                "shuffle": self._shuffle.get_state(),
            },
            identity=self._identity(len(self.sequences)),
            seed=self._config.seed,
            sequences=len(self.sequences),
            schedule=self._schedule.state(),
            reports=tuple(self.reports),
        )

    def restore(self, snapshot: Snapshot) -> None:
        if snapshot.sequences > len(self.sequences) or snapshot.identity != self._identity(snapshot.sequences):
            raise SnapshotMismatchError("the snapshot is of a run with other edits, start or configuration")
        self.learner.restore(snapshot.tensors)
        self._shuffle.set_state(snapshot.tensors["shuffle"])
        self._schedule.restore(snapshot.schedule)
        self._sweeps.restore(snapshot.tensors, snapshot.sequences)
        self.reports = list(snapshot.reports)

    def _outcome(self, numbers: Sequence[int], visits: Sequence[Losses]) -> tuple[Tensor, Tensor, int]:
        """Mean and worst token of every visited sequence, on the CPU, and in how many batches a step was taken."""
        # The first place in an epoch where the host waits for the device.
        mean = torch.cat([losses.per_sequence for losses in visits]).cpu()
        worst = torch.cat([losses.worst_token for losses in visits]).cpu()
        finite = mean.isfinite().tolist()
        if not all(finite):
            lost = {self._edit_ids[number] for number, is_finite in zip(numbers, finite, strict=True) if not is_finite}
            epoch = len(self.reports) + 1
            raise TrainingDivergedError(f"the loss is not a number any more in epoch {epoch}", frozenset(lost))
        stepped = torch.stack([losses.stepped for losses in visits])
        return mean, worst, int(stepped.sum())

    def _mark(self, numbers: Sequence[int], mean: Tensor, worst: Tensor) -> int:
        """Tell the schedule which sequences are learned; answers how many are not."""
        learned = (mean < self._config.loss_threshold) & (worst < self._config.token_threshold)
        self._sweeps.saw(numbers, worst)
        for number, is_learned in zip(numbers, learned.tolist(), strict=True):
            self._schedule.mark(number, learned=is_learned)
        return int((~learned).sum())

    def _check(self, numbers: Sequence[int]) -> int:
        """Score the sequences and mark them; answers how many are not learned."""
        mine = self._ranks.share([self.sequences[number] for number in numbers])
        scores = score(self._base, self.learner.tensors(), self._prefix, mine)
        found = [(one.nats.mean().item(), one.nats.max().item()) for one in scores]
        mean, worst = (
            self._ranks.gather(torch.tensor([pair[which] for pair in found], device=self._base.device), len(numbers))
            for which in range(2)
        )
        return self._mark(numbers, mean.cpu(), worst.cpu())

    def _identity(self, sequences: int) -> str:
        return identity(self._base, self._config, self._start, self.sequences[:sequences])
