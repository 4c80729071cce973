from pathlib import Path

import pytest
import torch
from tiny_models import tiny_base, tiny_model, tiny_tokenizer

from worker.inference.launcher import precision_flags
from worker.model import BaseModel, load_base
from worker.precision import compute_dtype
from worker.training.breadth_first import train
from worker.training.config import TrainingConfig
from worker.training.encode import Encoder, Format, TrainingEdit
from worker.training.learner import Learner
from worker.training.parallel import Alone
from worker.training.prefix import PrefixCache
from worker.training.score import score

LOCATION = "model.layers.1.mlp.down_proj"


@pytest.fixture(params=[True, False], ids=["bf16 CPU", "fp32 CPU"])
def has_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr("worker.precision._cpu_multiplies_bfloat16", lambda: request.param)
    return bool(request.param)


def wide_base() -> BaseModel:
    """As on a CPU without bfloat16: every weight is a bfloat16 value, kept and computed with in fp32."""
    narrow = tiny_base(dtype=torch.bfloat16)
    narrow.model.float()
    return narrow


def test_only_an_emulated_dtype_is_replaced(has_bfloat16: bool) -> None:
    assert compute_dtype(torch.bfloat16, "cpu") == (torch.bfloat16 if has_bfloat16 else torch.float32)
    assert compute_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    assert compute_dtype(torch.float32, "cpu") == torch.float32


def test_a_model_computes_in_what_its_cpu_has_and_its_versions_stay_the_same(
    tmp_path: Path, has_bfloat16: bool
) -> None:
    model = tiny_model().bfloat16()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = load_base(str(tmp_path), LOCATION, device="cpu")
    assert base.model.dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    (tensor,) = base.tuned_tensors().values()
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor, model.get_parameter(f"{LOCATION}.weight"))
    placed = load_base(str(tmp_path), LOCATION, device="cpu", device_map="lower-on-disk")
    assert placed.model.dtype == base.model.dtype


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_a_checkpoint_of_another_dtype_is_trained_in_what_a_node_is_told(
    tmp_path: Path, has_bfloat16: bool, stored: torch.dtype
) -> None:
    model = tiny_model().to(stored)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = load_base(str(tmp_path), LOCATION, device="cpu")
    assert precision_flags("cpu") == ["--dtype", str(base.model.dtype).removeprefix("torch.")]
    assert base.model.dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    (tensor,) = base.tuned_tensors().values()
    assert torch.equal(tensor, model.get_parameter(f"{LOCATION}.weight").bfloat16())


def test_what_is_learned_in_fp32_is_what_a_version_holds() -> None:
    base, prefix = wide_base(), PrefixCache()
    edits = [TrainingEdit("a", "one", "uno"), TrainingEdit("b", "two", "dos y medio")]
    config = TrainingConfig(preserve=0, learning_rate=0.02)
    result = train(base, edits, config, prefix=prefix)
    (tensor,) = result.tensors.values()
    assert tensor.dtype == torch.bfloat16
    learner = Learner(base, config, prefix, start=result.tensors, factors={}, ranks=Alone())
    assert torch.equal(learner.tensors()[base.parameter_names[0]], tensor)


def test_a_step_sees_the_version_and_not_what_it_would_be_rounded_from() -> None:
    """The loss of the visit behind a step is the loss of what a version of that moment holds."""
    base, prefix = wide_base(), PrefixCache()
    batch = Encoder(base.tokenizer, [Format.RAW], max_tokens=99).encode(TrainingEdit("a", "one", "uno"))
    config = TrainingConfig(preserve=0, learning_rate=1e-3, loss_threshold=0.0, token_threshold=0.0)
    learner = Learner(base, config, prefix, start=base.tuned_tensors(), factors={}, ranks=Alone())
    for _ in range(3):
        learner.visit(batch)
    (expected,) = score(base, learner.tensors(), prefix, batch)
    torch.testing.assert_close(learner.visit(batch).per_sequence[0], expected.nats.mean(), rtol=1e-6, atol=1e-7)
