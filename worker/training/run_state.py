"""The state of a run: its sequences, which of them are learned, what is trained, and the epochs so far.

One object of it is made, stepped and asked by `worker.training.breadth_first.train`.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from worker.model import BaseModel
from worker.training.calibration import random_prefixes
from worker.training.config import Pipeline, TrainingConfig
from worker.training.encode import Encoder, TokenSequence, TrainingEdit, supported_formats
from worker.training.errors import TrainingCancelledError, TrainingDivergedError
from worker.training.learner import Learner, Losses
from worker.training.parallel import Ranks
from worker.training.prefix import PrefixCache
from worker.training.preserve import Factors
from worker.training.schedule import schedule
from worker.training.score import score
from worker.training.snapshot import EpochReport, Snapshot, SnapshotMismatchError, identity
from worker.training.sweeps import Sweeps


def encoder_for(base: BaseModel, config: TrainingConfig) -> Encoder:
    """The encoder of a run: what it makes of an edit is what the run trains."""
    return Encoder(
        base.tokenizer,
        config.formats or supported_formats(base.tokenizer),
        max_tokens=config.max_tokens,
        random_prefixes=random_prefixes(config.random_prefixes),
    )


class RunState:
    """A run between two batches. What is trained is its `learner`'s."""

    def __init__(
        self,
        base: BaseModel,
        config: TrainingConfig,
        prefix: PrefixCache,
        *,
        tensors: Mapping[str, Tensor],
        known: frozenset[str],
        factors: Factors,
        ranks: Ranks,
    ) -> None:
        """A run without edits yet, from `tensors`, by parameter name; edits of the ids `known` are learned by them."""
        self._base = base
        self._config = config
        self._prefix = prefix
        self._start = tensors
        self._known = known
        self._ranks = ranks
        self._shuffle = torch.Generator().manual_seed(config.seed)
        self._schedule = schedule(config, self._shuffle)
        self._encoder = encoder_for(base, config)
        self.learner = Learner(base, config, prefix, start=tensors, factors=factors, ranks=ranks)
        self.sequences: list[TokenSequence] = []
        self._edit_ids: list[str] = []  # of each sequence
        self._to_learn: list[bool] = []  # of each sequence: not learned when it joined, or when a sweep came to it
        self.reports: list[EpochReport] = []
        self._filled = 0  # sequences whose prefix was looked after
        self._sweeps = Sweeps(config)

    def join(self, edits: Sequence[TrainingEdit]) -> None:
        """Add edits at the end; the budget begins anew. Raises EncodingError."""
        learned: list[bool] = []
        for edit in edits:
            sequences = self._encoder.encode(edit)
            self.sequences += sequences
            self._edit_ids += [edit.id] * len(sequences)
            learned += [edit.id in self._known] * len(sequences)
        self._to_learn += [not is_learned for is_learned in learned]
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
        return self._part(sum(report.visited for report in reports), sum(report.batches for report in reports))

    def _part(self, visited: int, batches: int) -> float:
        """Which part of the budget so many visits, in so many batches, use up.

        It is for what there was to learn, and for as many learned ones beside it: an edit that cannot be learned must
        not cost each later run what the whole set would. What the steps of an epoch disturb does not add to it.
        """
        budgeted = min(len(self.sequences), max(1, 2 * sum(self._to_learn)))
        by_visits = visited / (self._config.max_epochs * budgeted)
        return min(by_visits, batches / self._config.min_steps) if self._config.min_steps else by_visits

    def epoch(self, should_stop: Callable[[], bool]) -> EpochReport:
        """Visit what the schedule says, and tell it what was found.

        Raises:
            TrainingDivergedError: the loss is not finite.
            TrainingCancelledError: `should_stop` said so.
        """
        started = time.perf_counter()
        self._prefix.fill(self._base, self._ranks.share(self.sequences[self._filled :]), should_stop)
        self._filled = len(self.sequences)
        self.learner.set_learning_rate(self._progress, at_most=math.sqrt(self._schedule.replayed))
        batches = self._schedule.epoch()
        if self._schedule.starts_over:
            self.learner.start_over()
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
            unlearned=len(unlearned),
            batches=len(batches),
            steps=steps,
            tokens=sum(len(self.sequences[number].token_ids) for number in numbers),
            seconds=time.perf_counter() - started,
            spent=self._part(len(numbers), len(batches)),
            budget=0.0,
        )
        self.reports.append(report)
        self.reports[-1] = dataclasses.replace(report, budget=min(1.0, self._progress))
        return self.reports[-1]

    def learned(self, should_stop: Callable[[], bool]) -> bool:
        """Whether all sequences are, judged as the configuration says. Raises as `epoch` does."""
        if self._config.judges_sequences:

            def check(numbers: Sequence[int]) -> int:
                if should_stop():
                    raise TrainingCancelledError(f"cancelled behind epoch {len(self.reports)}")
                return self._check(numbers)

            return self._schedule.finished and self._sweeps.sweep(self.steps, check)
        last = self.reports[-1]
        return last.loss < self._config.loss_threshold and last.worst_token_loss < self._config.token_threshold

    def snapshot(self) -> Snapshot:
        """What `restore` needs; a copy."""
        return Snapshot(
            tensors={
                **self.learner.state(),
                **self._sweeps.state(),
                "shuffle": self._shuffle.get_state(),
                "to_learn": torch.tensor(self._to_learn),
            },
            identity=self._identity(len(self.sequences)),
            seed=self._config.seed,
            sequences=len(self.sequences),
            schedule=self._schedule.state(),
            reports=tuple(self.reports),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot; edits that joined behind its own stay. Raises SnapshotMismatchError."""
        if snapshot.sequences > len(self.sequences) or snapshot.identity != self._identity(snapshot.sequences):
            raise SnapshotMismatchError("the snapshot is of a run with other edits, start or configuration")
        self.learner.restore(snapshot.tensors)
        self._shuffle.set_state(snapshot.tensors["shuffle"])
        self._schedule.restore(snapshot.schedule)
        self._sweeps.restore(snapshot.tensors, snapshot.sequences)
        self._to_learn[: snapshot.sequences] = snapshot.tensors["to_learn"].tolist()
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

    def _mark(self, numbers: Sequence[int], mean: Tensor, worst: Tensor) -> list[int]:
        """Tell the schedule which sequences are learned; answers which are not."""
        learned = (mean < self._config.loss_threshold) & (worst < self._config.token_threshold)
        self._sweeps.saw(numbers, worst)
        for number, is_learned in zip(numbers, learned.tolist(), strict=True):
            self._schedule.mark(number, learned=is_learned)
        return [number for number, is_learned in zip(numbers, learned.tolist(), strict=True) if not is_learned]

    def _check(self, numbers: Sequence[int]) -> int:
        """Score the sequences and mark them; answers how many are not learned."""
        mine = self._ranks.share([self.sequences[number] for number in numbers])
        scores = score(self._base, self.learner.tensors(), self._prefix, mine)
        found = [(one.nats.mean().item(), one.nats.max().item()) for one in scores]
        mean, worst = (
            self._ranks.gather(torch.tensor([pair[which] for pair in found], device=self._base.device), len(numbers))
            for which in range(2)
        )
        unlearned = self._mark(numbers, mean.cpu(), worst.cpu())
        for number in unlearned:
            self._to_learn[number] = True
        return len(unlearned)

    def _identity(self, sequences: int) -> str:
        return identity(self._base, self._config, self._start, self.sequences[:sequences])
