"""Which sequences each epoch visits, and in which batches."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from typing_extensions import override

from worker.training.config import Pipeline, TrainingConfig

Batches = list[list[int]]
ScheduleState = Mapping[str, Any]


class Schedule(ABC):
    """Hands out an epoch's batches of sequence numbers and is told which of them are learned."""

    @abstractmethod
    def epoch(self) -> Batches:
        """The batches of the next epoch."""

    @abstractmethod
    def mark(self, sequence: int, *, learned: bool) -> None:
        """What the latest look at a sequence found."""

    @abstractmethod
    def join(self, learned: Sequence[bool]) -> None:
        """Add sequences at the end: for each, whether it is learned already."""

    @property
    @abstractmethod
    def starts_over(self) -> bool:
        """Whether the latest epoch's steps are to know nothing of the steps before: its optimiser state begins anew."""

    @property
    @abstractmethod
    def replayed(self) -> float:
        """Which share of what is learned the next epoch visits, 1 when nothing is."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether there is nothing left to visit."""

    @abstractmethod
    def state(self) -> ScheduleState:
        """What `restore` needs, as JSON values."""

    @abstractmethod
    def restore(self, state: ScheduleState) -> None:
        """Go on from an earlier state; sequences that joined since stay as they are."""


class BreadthFirst(Schedule):
    """Every epoch over all sequences, or over those that need it.

    With `skip_learned` an epoch visits what is not learned, and as many learned ones, at least a batch of them: steps
    that see only what is new would undo what is old.
    """

    def __init__(self, config: TrainingConfig, shuffle: torch.Generator) -> None:
        self._config = config
        self._shuffle = shuffle
        self.learned: list[bool] = []

    @override
    def epoch(self) -> Batches:
        return _batches(_shuffled(self._visited(), self._shuffle), self._config.batch_size)

    @override
    def mark(self, sequence: int, *, learned: bool) -> None:
        self.learned[sequence] = learned

    @override
    def join(self, learned: Sequence[bool]) -> None:
        self.learned += learned

    @property
    @override
    def starts_over(self) -> bool:
        return False

    @property
    @override
    def replayed(self) -> float:
        known = sum(self.learned)
        return min(1.0, self._replays / known) if known else 1.0

    @property
    @override
    def finished(self) -> bool:
        return all(self.learned)

    @override
    def state(self) -> ScheduleState:
        return {
            "count": len(self.learned),
            "learned": [number for number, learned in enumerate(self.learned) if learned],
        }

    @override
    def restore(self, state: ScheduleState) -> None:
        learned = set(state["learned"])
        self.learned = [number in learned for number in range(state["count"])] + self.learned[state["count"] :]

    def _visited(self) -> list[int]:
        everything = range(len(self.learned))
        if not self._config.skip_learned:
            return list(everything)
        waiting = [number for number in everything if not self.learned[number]]
        known = _shuffled([number for number in everything if self.learned[number]], self._shuffle)
        return waiting + known[: self._replays]

    @property
    def _replays(self) -> int:
        if not self._config.skip_learned:
            return len(self.learned)
        return max(self._config.batch_size, self.learned.count(False))


class DepthFirst(Schedule):
    """One batch at a time, visited until it is learned or its epochs are used up; never visited again after that.

    Each batch is an edit, or some, made by itself on top of those before, with an optimiser of its own.
    """

    def __init__(self, config: TrainingConfig, shuffle: torch.Generator) -> None:
        self._config = config
        self._shuffle = shuffle
        self._waiting: Batches = []
        self._current: list[int] = []
        self._unlearned: set[int] = set()
        self._visits = 0
        self._count = 0

    @override
    def epoch(self) -> Batches:
        if not self._unlearned or self._visits == self._config.max_epochs:
            self._current = self._waiting.pop(0)
            self._unlearned = set(self._current)
            self._visits = 0
        self._visits += 1
        return [self._current]

    @override
    def mark(self, sequence: int, *, learned: bool) -> None:
        # A batch is learned when all of it is, at one look.
        if learned:
            self._unlearned.discard(sequence)
        elif sequence in self._current:
            self._unlearned.add(sequence)

    @override
    def join(self, learned: Sequence[bool]) -> None:
        new = [self._count + place for place, is_learned in enumerate(learned) if not is_learned]
        self._waiting += _batches(_shuffled(new, self._shuffle), self._config.batch_size)
        self._count += len(learned)

    @property
    @override
    def starts_over(self) -> bool:
        return self._visits == 1

    @property
    @override
    def replayed(self) -> float:
        return 1.0

    @property
    @override
    def finished(self) -> bool:
        return not self._waiting and (not self._unlearned or self._visits == self._config.max_epochs)

    @override
    def state(self) -> ScheduleState:
        return {
            "count": self._count,
            "waiting": list(self._waiting),
            "current": self._current,
            "unlearned": sorted(self._unlearned),
            "visits": self._visits,
        }

    @override
    def restore(self, state: ScheduleState) -> None:
        joined = [number for batch in self._waiting for number in batch if number >= state["count"]]
        self._waiting = [*state["waiting"], *_batches(joined, self._config.batch_size)]
        self._current = state["current"]
        self._unlearned = set(state["unlearned"])
        self._visits = state["visits"]


def schedule(config: TrainingConfig, shuffle: torch.Generator) -> Schedule:
    """The schedule of the configuration's pipeline, without sequences yet."""
    return (BreadthFirst if config.pipeline == Pipeline.BREADTH_FIRST else DepthFirst)(config, shuffle)


def _shuffled(numbers: Sequence[int], shuffle: torch.Generator) -> list[int]:
    return [numbers[place] for place in torch.randperm(len(numbers), generator=shuffle).tolist()]


def _batches(order: Sequence[int], size: int) -> Batches:
    return [list(order[start : start + size]) for start in range(0, len(order), size)]
