"""One base model with all that training and measuring its versions takes.

It keeps what is found out once: prefixes, what is to be preserved, what the base itself says.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from service.schemas import Format
from worker.evaluation.metrics import EvaluationEdit, Evaluator, Metrics
from worker.model import BaseModel
from worker.training.breadth_first import FROM_BASE, Hooks, Start, TrainingResult, train
from worker.training.config import TrainingConfig
from worker.training.encode import TrainingEdit
from worker.training.parallel import Ranks
from worker.training.prefix import PrefixCache
from worker.training.preserve import Preservation


class AnyEdit(Protocol):
    """What the service's edits and the rows of edit files have in common."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def prompt(self) -> str: ...  # noqa: D102
    @property
    def target(self) -> str: ...  # noqa: D102
    @property
    def rephrases(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def paraphrases(self) -> Sequence[str]: ...  # noqa: D102


class Workbench:
    """Trains and measures versions of one base model."""

    def __init__(self, base: BaseModel, prefix: PrefixCache, folder: Path) -> None:
        """Keep what preservation measures in `folder`."""
        self.base = base
        self.prefix = prefix
        self._preservation = Preservation(base, prefix, folder)
        self._evaluator = Evaluator(base, prefix=prefix)

    def prepare_training(self, config: TrainingConfig) -> None:
        """Measure what is to be preserved, so that the first training is as quick as the next."""
        if config.preserve:
            self._preservation.factors(config.preserve)

    def prepare_evaluation(self) -> None:
        """Find out what the base itself says, so that the first evaluation is as quick as the next."""
        self._evaluator.prepare()

    def train(
        self,
        edits: Sequence[TrainingEdit],
        config: TrainingConfig,
        *,
        start: Start = FROM_BASE,
        ranks: Ranks | None = None,
        hooks: Hooks | None = None,
    ) -> TrainingResult:
        """Learn the edits: `worker.training.breadth_first.train`, whose errors it raises."""
        return train(
            self.base,
            edits,
            config,
            prefix=self.prefix,
            factors=self._preservation.factors(config.preserve) if config.preserve else None,
            start=start,
            ranks=ranks,
            hooks=hooks,
        )

    def evaluate(
        self, edits: Sequence[EvaluationEdit], tensors: Mapping[str, Tensor], formats: Sequence[Format] | None = None
    ) -> Metrics:
        """Measure `tensors` (by parameter name) on the edits and their rephrases, as `Evaluator.evaluate` does."""
        return self._evaluator.evaluate(edits, tensors, formats)


def training_edit(edit: AnyEdit) -> TrainingEdit:
    """An edit as a run takes it."""
    return TrainingEdit(edit.id, edit.prompt, edit.target, tuple(edit.paraphrases))


def evaluation_edit(edit: AnyEdit) -> EvaluationEdit:
    """An edit as it is measured, its rephrases with it."""
    return EvaluationEdit(edit.id, edit.prompt, edit.target, tuple(edit.rephrases))
