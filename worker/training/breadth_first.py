"""The training loop: LocFT-BF (arXiv 2509.22072) over a cumulative edit set, from the base or from a version.

Takes objects and returns objects: no files, no stores, no clock but a stopwatch.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from worker.model import BaseModel
from worker.training.config import TrainingConfig
from worker.training.encode import TrainingEdit
from worker.training.parallel import Alone, Ranks
from worker.training.prefix import PrefixCache
from worker.training.preserve import Factors
from worker.training.run_state import RunState
from worker.training.snapshot import EpochReport, Snapshot


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
    """The tuned tensors by parameter name (in a version's dtype, on the CPU) and how they came about."""

    tensors: Mapping[str, Tensor]
    epochs: tuple[EpochReport, ...]
    stopped: StopReason
    steps: int
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
    run = RunState(
        base,
        config,
        prefix,
        tensors=start.tensors or base.tuned_tensors(),
        known=start.learned,
        factors=factors or {},
        ranks=ranks or Alone(),
    )
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
        train_s=time.perf_counter() - started,
    )
