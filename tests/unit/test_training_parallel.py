"""Two real processes, joined by gloo, against one."""

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ROOMY, tiny_base
from torch import Tensor, distributed

from worker.training.breadth_first import TrainingResult, train
from worker.training.config import TrainingConfig
from worker.training.encode import Format, TrainingEdit
from worker.training.parallel import Alone, DataParallel, Ranks
from worker.training.prefix import PrefixCache
from worker.training.preserve import factors

RANKS = 2
EDITS = [TrainingEdit(f"e{number}", f"{number} is", f"{number * 7 % 10}") for number in range(5)]
STEPS = {"learning_rate": 1e-2, "preserve": 0, "loss_threshold": 0.0, "min_steps": 0, "max_epochs": 4}


@dataclass(frozen=True)
class Found:
    """What one process has at the end; `sent` are the numbers of values of every message."""

    tensors: Mapping[str, Any]
    losses: Sequence[float]
    stopped: str
    steps: int
    sent: Sequence[int]


def run(edits: Sequence[TrainingEdit], settings: Mapping[str, Any], ranks: Ranks) -> TrainingResult:
    config = TrainingConfig(**{**STEPS, **settings})
    base = tiny_base(**ROOMY)
    loud = {name: torch.linspace(0, 4, tensor.shape[1]).diag() for name, tensor in base.tuned_tensors().items()}
    kept_quiet = factors(loud, config.preserve, base.device) if config.preserve else None
    return train(base, edits, config, prefix=PrefixCache(), factors=kept_quiet, ranks=ranks)


def _process(
    rank: int, meeting: str, jobs: Sequence[tuple[Sequence[TrainingEdit], Mapping[str, Any]]], answers: "Queue[Any]"
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60)
    )
    sent: list[int] = []
    real: Callable[..., Any] = distributed.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return real(tensor, *arguments, **options)

    distributed.all_reduce = counted
    for edits, settings in jobs:
        sent.clear()
        result = run(edits, settings, DataParallel())
        arrays = {name: tensor.numpy() for name, tensor in result.tensors.items()}
        losses = [report.loss for report in result.epochs]
        answers.put((rank, Found(arrays, losses, result.stopped.value, result.steps, tuple(sent))))
    distributed.destroy_process_group()


JOBS: dict[str, tuple[Sequence[TrainingEdit], Mapping[str, Any]]] = {
    "even": (EDITS, {"batch_size": 4}),
    "odd": (EDITS, {"batch_size": 3}),
    "preserved": (EDITS, {"batch_size": 4, "preserve": 0.1}),
    "one": (EDITS[:1], {"formats": (Format.RAW,)}),
    "learned": (
        EDITS[:1],
        {"formats": (Format.RAW,), "loss_threshold": 0.1, "learning_rate": 4e-2, "max_epochs": 99},
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Found]]:
    context = get_context("spawn")
    answers: Queue[Any] = context.Queue()
    meeting = tmp_path_factory.mktemp("gloo") / "meeting"
    processes = [
        context.Process(target=_process, args=(rank, str(meeting), list(JOBS.values()), answers))
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    by_rank: dict[int, list[Found]] = {rank: [] for rank in range(RANKS)}
    for _ in range(RANKS * len(JOBS)):
        rank, answer = answers.get(timeout=120)
        by_rank[rank].append(answer)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return {name: [by_rank[rank][place] for rank in range(RANKS)] for place, name in enumerate(JOBS)}


@pytest.mark.parametrize("job", JOBS)
def test_both_processes_end_with_the_same_bits(found: dict[str, list[Found]], job: str) -> None:
    first, second = found[job]
    assert all((second.tensors[name] == tensor).all() for name, tensor in first.tensors.items())
    assert first.losses == second.losses
    assert (first.stopped, first.steps) == (second.stopped, second.steps)


@pytest.mark.parametrize("job", JOBS)
def test_the_result_is_that_of_one_process(found: dict[str, list[Found]], job: str) -> None:
    edits, settings = JOBS[job]
    alone = run(edits, settings, Alone())
    together = found[job][0]
    assert (together.stopped, together.steps) == (alone.stopped, alone.steps)
    assert together.losses == pytest.approx([report.loss for report in alone.epochs], rel=1e-3)
    for name, tensor in alone.tensors.items():
        # Adam turns a gradient next to nothing, whose sign rounding decides, into a whole step: two learning rates.
        difference = (torch.from_numpy(together.tensors[name]) - tensor).abs()
        assert difference.mean() < 1e-4
        assert (difference > 1e-3).float().mean() < 0.02


def test_only_the_tuned_gradients_and_a_few_losses_travel(found: dict[str, list[Found]]) -> None:
    (matrix,) = (tensor.size for tensor in found["even"][0].tensors.values())
    batches = [4, 4, 2] * STEPS["max_epochs"]
    assert list(found["even"][0].sent) == [count for size in batches for count in (size, size, matrix)]


def test_a_process_without_a_share_takes_part(found: dict[str, list[Found]]) -> None:
    # One sequence for two processes, in the batches and in the check of what is learned.
    assert [len(answer.losses) for answer in found["one"]] == [STEPS["max_epochs"]] * 2
    assert found["learned"][1].stopped == "learned"


def test_shares_are_the_batch_dealt_out() -> None:
    dealt = []
    for rank in range(3):
        ranks = DataParallel.__new__(DataParallel)
        ranks._rank, ranks._count = rank, 3
        dealt.append(ranks.share([0, 1, 2, 3]))
    assert dealt == [[0, 3], [1], [2]]


def test_one_process_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(distributed, "all_reduce")
    run(EDITS[:1], {"max_epochs": 1}, Alone())
