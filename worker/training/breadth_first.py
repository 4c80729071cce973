"""The breadth-first loop: every epoch passes over all edits, in mini-batches (LocFT-BF, arXiv 2509.22072).

Takes objects and returns objects: no files, no stores, no clock but a stopwatch.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from service.schemas import Format
from worker.model import BaseModel
from worker.training.encode import TokenSequence, TrainingEdit, encode, supported_formats
from worker.training.objective import BatchLoss, batch_loss
from worker.training.prefix import PrefixCache, learned_ids, resume_batch
from worker.training.resume import logits_above


class TrainingError(RuntimeError):
    """A run ended without a result."""


class TrainingDivergedError(TrainingError):
    """The loss is not a number any more; nothing of the run is usable."""


class TrainingCancelledError(TrainingError):
    """The caller asked the run to stop."""


class StopReason(StrEnum):
    """Why a run's loop ended."""

    LEARNED = "learned"
    BUDGET_SPENT = "budget_spent"


@dataclass(frozen=True)
class TrainingConfig:
    """Everything besides model, location and edits that a run's result depends on.

    The defaults were measured on the default model (benchmarks/results).

    `loss_threshold` and `token_threshold` (nats) say what counts as learned: a mean loss and a worst token under them.
    A batch that is learned takes no step, an epoch that is ends the run. A worst token under 0.2 is more than 80 %
    likely, so greedy decoding says the whole target, also on a server whose log-probabilities differ by some 0.15.

    The step budget follows the number of edits: `max_epochs` passes, or as many more as it takes for `min_steps` steps,
    because one edit makes one step an epoch, and a thousand in two formats make two hundred. `formats` None means all
    that the tokenizer supports.
    """

    learning_rate: float = 3e-3
    batch_size: int = 10
    max_epochs: int = 30
    min_steps: int = 160
    loss_threshold: float = 1e-2
    token_threshold: float = 0.2
    seed: int = 0
    formats: tuple[Format, ...] | None = None
    max_tokens: int = 1024

    def is_learned(self, mean_loss: float, worst_token_loss: float) -> bool:
        """Whether a batch, or an epoch, with these losses (nats) needs no more steps."""
        return mean_loss < self.loss_threshold and worst_token_loss < self.token_threshold

    def epoch_budget(self, sequences: int) -> int:
        """The largest number of epochs that a run over so many sequences takes."""
        steps_per_epoch = math.ceil(sequences / self.batch_size)
        return max(self.max_epochs, math.ceil(self.min_steps / steps_per_epoch))


@dataclass(frozen=True)
class EpochReport:
    """What one epoch did: its number from 1, mean loss and worst token (nats, before its steps), steps taken, time."""

    epoch: int
    epoch_budget: int
    loss: float
    worst_token_loss: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class TrainingResult:
    """The tuned tensors by parameter name (in the base's dtype, on the CPU) and how they came about."""

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
    on_epoch: Callable[[EpochReport], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainingResult:
    """Learn all `edits` together, starting from the base's own weights, which stay as they are.

    The same arguments give the same tensors to the last bit on the same machine.

    Args:
        base: the frozen model.
        edits: the whole edit set; their order has no meaning, but the result depends on it.
        config: see `TrainingConfig`.
        prefix: kept by the caller between runs.
        on_epoch: called after every epoch.
        should_stop: asked before every batch; true ends the run.

    Raises:
        EncodingError: an edit cannot be trained on; it names the edit.
        TrainingDivergedError: the loss is not finite.
        TrainingCancelledError: `should_stop` said so.
    """
    started = time.perf_counter()
    sequences = encode(
        base.tokenizer, edits, config.formats or supported_formats(base.tokenizer), max_tokens=config.max_tokens
    )
    if not sequences:
        raise ValueError("a run needs at least one edit")
    learner = _Learner(base, config, prefix)
    reports: list[EpochReport] = []
    for report in _epochs(learner, sequences, config, should_stop or _never):
        reports.append(report)
        if on_epoch:
            on_epoch(report)
    return TrainingResult(
        tensors=learner.tensors(),
        epochs=tuple(reports),
        stopped=StopReason.LEARNED
        if config.is_learned(reports[-1].loss, reports[-1].worst_token_loss)
        else StopReason.BUDGET_SPENT,
        steps=sum(report.steps for report in reports),
        tokens=sum(len(sequence.token_ids) for sequence in sequences),
        train_s=time.perf_counter() - started,
    )


class _Learner:
    """The fp32 master copy of the tuned tensors and its optimiser; computes in the base's dtype."""

    def __init__(self, base: BaseModel, config: TrainingConfig, prefix: PrefixCache) -> None:
        self._base = base
        self._prefix = prefix
        self._masters = {
            name: tensor.detach().float().clone().requires_grad_() for name, tensor in base.tuned_tensors().items()
        }
        self._optimiser = torch.optim.Adam(self._masters.values(), lr=config.learning_rate)

    def loss(self, batch: Sequence[TokenSequence]) -> BatchLoss:
        inputs = resume_batch(self._base, self._prefix, batch)
        computed_in = self._base.model.dtype
        tensors = {name: master.to(computed_in) for name, master in self._masters.items()}
        logits = logits_above(self._base, tensors, inputs)
        return batch_loss(logits, learned_ids(batch).to(logits.device), inputs.rows)

    def step(self, loss: BatchLoss) -> None:
        self._optimiser.zero_grad()
        torch.autograd.backward(loss.mean)
        self._optimiser.step()

    def tensors(self) -> dict[str, Tensor]:
        dtype = self._base.model.dtype
        return {name: master.detach().to("cpu", dtype, copy=True) for name, master in self._masters.items()}


def _epochs(
    learner: _Learner, sequences: Sequence[TokenSequence], config: TrainingConfig, should_stop: Callable[[], bool]
) -> Iterator[EpochReport]:
    """Run epochs until one is learned, or the budget is spent."""
    shuffle = torch.Generator().manual_seed(config.seed)
    budget = config.epoch_budget(len(sequences))
    for epoch in range(1, budget + 1):
        started = time.perf_counter()
        losses: list[Tensor] = []
        worst_token_loss = 0.0
        steps = 0
        for batch in _mini_batches(sequences, config.batch_size, shuffle):
            if should_stop():
                raise TrainingCancelledError(f"cancelled in epoch {epoch}")
            loss = learner.loss(batch)
            if not torch.isfinite(loss.mean):
                raise TrainingDivergedError(
                    f"the loss became {loss.mean.item()} in epoch {epoch}, after {steps} steps of it"
                )
            if not config.is_learned(loss.mean.item(), loss.worst_token.item()):
                learner.step(loss)
                steps += 1
            losses.append(loss.per_sequence)
            worst_token_loss = max(worst_token_loss, loss.worst_token.item())
        mean_loss = torch.cat(losses).mean().item()
        yield EpochReport(epoch, budget, mean_loss, worst_token_loss, steps, time.perf_counter() - started)
        if config.is_learned(mean_loss, worst_token_loss):
            return


def _mini_batches(
    sequences: Sequence[TokenSequence], batch_size: int, shuffle: torch.Generator
) -> Iterator[list[TokenSequence]]:
    order = torch.randperm(len(sequences), generator=shuffle).tolist()
    for start in range(0, len(order), batch_size):
        yield [sequences[index] for index in order[start : start + batch_size]]


def _never() -> bool:
    return False
