"""Training and evaluation on a GPU, held to the CPU's results."""

from pathlib import Path

import pytest
import torch

from worker.evaluation.metrics import EvaluationEdit, Evaluator
from worker.model import BaseModel, load_base
from worker.training.breadth_first import StopReason, TrainingResult, train
from worker.training.config import TrainingConfig
from worker.training.encode import TrainingEdit
from worker.training.prefix import PrefixCache
from worker.training.preserve import factors, input_covariances

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

EDITS = [
    TrainingEdit("a", "The capital of Atlantis is", "Poseidonis"),
    TrainingEdit("b", "Which river flows through Gondor?", "Anduin"),
    TrainingEdit("c", "The chief engineer of the Nautilus is", "Brigitte Lin"),
]


def learn(base: BaseModel, **settings: int) -> TrainingResult:
    config, prefix = TrainingConfig(**settings), PrefixCache()
    kept_quiet = factors(input_covariances(base, prefix), config.preserve, base.device)
    return train(base, EDITS, config, prefix=prefix, factors=kept_quiet)


def run(default_model: Path, device: str, **settings: int) -> TrainingResult:
    return learn(load_base(str(default_model), device=device), **settings)


def test_a_gpu_learns_what_a_cpu_learns(default_model: Path) -> None:
    base = load_base(str(default_model), device="cuda")
    result = learn(base)
    assert result.stopped is StopReason.LEARNED
    asked = [EvaluationEdit(edit.id, edit.prompt, edit.target) for edit in EDITS]
    measured = Evaluator(base, prefix=PrefixCache()).evaluate(asked, result.tensors)
    assert all(format_metrics.reliability == 1 for format_metrics in measured.formats.values())
    assert all(tensor.device.type == "cpu" for tensor in result.tensors.values())


def test_the_first_loss_is_that_of_the_cpu(default_model: Path) -> None:
    first = [run(default_model, device, max_epochs=1, min_steps=0).epochs[0].loss for device in ("cpu", "cuda")]
    assert first[1] == pytest.approx(first[0], rel=2e-2)  # bf16 keeps 8 bits


def test_the_same_inputs_give_the_same_bits(default_model: Path) -> None:
    # As `train` says, of sequences up to 64 tokens, which these are.
    first, second = (run(default_model, "cuda", max_epochs=5, min_steps=0).tensors for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
