"""Sweeps: looks at what passes for learned and may have been forgotten since, by steps that others needed."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from worker.training.config import TrainingConfig

# A sweep looks at so many sequences before it asks itself whether to go on.
_CHECKED_AT_ONCE = 256


class Sweeps:
    """How sure each sequence was when it was last looked at, and what the round of sweeps has still to look at.

    A sweep looks at the unsure and, from where the last one ended, at the rest: what was sure when it was just looked
    at seldom is forgotten a few steps later, and one that looked at it again each time would come late to what lies
    behind it. It ends when a batch was forgotten: more would be in vain, as training the batch changes the rest. A
    round, which begins with the least sure, is over when everything was looked at.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._enough = config.batch_size
        self._unsure = config.token_threshold / 2
        self._worst = torch.zeros(0)  # [sequences], nats: each one's worst token when it was last looked at
        self._unswept = torch.zeros(0, dtype=torch.bool)  # [sequences]
        self._steps_before = -1  # the run's when the round began; a resumed run does not know

    def join(self, sequences: int) -> None:
        """So many sequences were added at the end; nothing is known of them."""
        self._worst = torch.cat([self._worst, torch.full((sequences,), torch.inf)])
        self._unswept = torch.cat([self._unswept, torch.ones(sequences, dtype=torch.bool)])

    def saw(self, numbers: Sequence[int], worst: Tensor) -> None:
        """What the latest look at some sequences found: ``worst`` is [numbers], nats, of each one's worst token."""
        self._worst[list(numbers)] = worst

    def sweep(self, steps: int, check: Callable[[list[int]], int]) -> bool:
        """Whether nothing is forgotten: a whole round found nothing, and no step was taken in it.

        Args:
            steps: how many the run has taken.
            check: looks at sequences, tells `saw`, and answers how many of them are forgotten.
        """
        while True:
            if self._unswept.all():
                self._steps_before = steps
            forgotten = 0
            for numbers in self._due().split(_CHECKED_AT_ONCE):
                self._unswept[numbers] = False
                forgotten += check(numbers.tolist())
                if forgotten >= self._enough:
                    return False
            if forgotten:
                return False
            if self._steps_before == steps:
                return True
            self._unswept.fill_(True)

    def state(self) -> Mapping[str, Tensor]:
        """What `restore` needs; a copy."""
        return {"worst": self._worst.clone(), "unswept": self._unswept.clone()}

    def restore(self, state: Mapping[str, Tensor], sequences: int) -> None:
        """Go on from an earlier state, of so many sequences; those that joined since stay as they are."""
        self._worst[:sequences] = state["worst"]
        self._unswept[:sequences] = state["unswept"]

    def _due(self) -> Tensor:
        """Numbers of the sequences that a sweep looks at, int64, the least sure first."""
        order = self._worst.argsort(descending=True, stable=True)
        due = self._unswept | (self._worst > self._unsure)
        return order[due[order]]
