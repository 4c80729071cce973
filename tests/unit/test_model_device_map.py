"""A model that a device map spreads over a device and the disk trains as the whole one does."""

import gc
from pathlib import Path

import pytest
import torch
from tiny_models import ROOMY, down_projection, tiny_model, tiny_tokenizer
from torch import Tensor

from service.schemas import Format
from worker.evaluation.answers import ask
from worker.model import BaseModel, load_base
from worker.placement import LOWER_ON_DISK, DeviceMap, PlacementError
from worker.training.breadth_first import TrainingResult, train
from worker.training.config import TrainingConfig
from worker.training.encode import TrainingEdit
from worker.training.prefix import PrefixCache

EDITS = [TrainingEdit("a", "one", "uno"), TrainingEdit("b", "two", "dos")]
UPPER = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
MAPS: dict[str, DeviceMap] = {
    "lower-on-disk": LOWER_ON_DISK,
    "forced": UPPER | {f"model.layers.{index}": "disk" if index < 2 else "cpu" for index in range(4)},
    "half-of-it": UPPER | {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(4)},
    "above-too": UPPER | {f"model.layers.{index}": "cpu" if index == 2 else "disk" for index in range(4)},
    "auto": "auto",
}


def saved(folder: Path, family: str = "llama") -> Path:
    tiny_model(family, **ROOMY).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(
    folder: Path, device_map: DeviceMap | None = None, family: str = "llama", dtype: torch.dtype = torch.float32
) -> BaseModel:
    return load_base(str(folder), down_projection(family, 2), device="cpu", dtype=dtype, device_map=device_map)


def run(base: BaseModel) -> TrainingResult:
    return train(base, EDITS, TrainingConfig(preserve=0, max_epochs=3, min_steps=0), prefix=PrefixCache())


def on_disk(base: BaseModel) -> set[str]:
    return {name for name, parameter in base.model.named_parameters() if parameter.is_meta}


def values(base: BaseModel) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in base.model.named_parameters() if not parameter.is_meta}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAPS)
def test_training_gives_the_same_bits_and_leaves_everything_as_it_was(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    folder = saved(tmp_path)
    base = load(folder, MAPS[name], dtype=dtype)
    disk, before = on_disk(base), values(base)
    ours, whole = run(base), run(load(folder, dtype=dtype))
    assert whole.steps > 0
    assert disk or name == "auto", "all of it may fit"
    assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in whole.tensors.items())
    assert on_disk(base) == disk
    assert all(torch.equal(parameter, before[name]) for name, parameter in values(base).items())


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "qwen2_moe"])
def test_other_families_lie_on_disk_too(tmp_path: Path, family: str) -> None:
    folder = saved(tmp_path, family)
    base, whole = load(folder, LOWER_ON_DISK, family), load(folder, None, family)
    lower = ("model.layers.0.", "model.layers.1.")
    assert on_disk(base) == {name for name, _ in whole.model.named_parameters() if name.startswith(lower)}
    assert all(torch.equal(run(base).tensors[name], tensor) for name, tensor in run(whole).tensors.items())


def test_the_lower_layers_are_on_disk_before_and_after_their_one_pass(tmp_path: Path) -> None:
    base = load(saved(tmp_path), LOWER_ON_DISK)
    lower = {name for name, _ in base.model.named_parameters() if ".layers.0." in name or ".layers.1." in name}
    resident: list[set[str]] = []
    base.layers[1].self_attn.register_forward_pre_hook(lambda *_: resident.append(lower - on_disk(base)))
    assert on_disk(base) == lower
    run(base)
    assert on_disk(base) == lower
    assert resident
    # Never more than a module of one layer at a time.
    assert all(not any(".layers.0." in name for name in names) for names in resident)


def test_a_training_step_does_not_read_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, prefix = load(saved(tmp_path), LOWER_ON_DISK), PrefixCache()
    config = TrainingConfig(preserve=0, max_epochs=2, min_steps=0)
    first = train(base, EDITS, config, prefix=prefix)
    lower = ("model.layers.0", "model.layers.1")
    reading = [
        module
        for name, module in base.model.named_modules()
        if name.startswith(lower) and "forward" in vars(module)  # accelerate's, which reads the weights first
    ]
    assert reading
    for module in reading:
        monkeypatch.setitem(vars(module), "forward", None)
    again = train(base, EDITS, config, prefix=prefix)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in first.tensors.items())


def test_a_model_partly_on_disk_answers_as_the_whole_one(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    bases = (load(folder), load(folder, LOWER_ON_DISK))
    answers = [ask(base, ["one", "and two"], Format.CHAT, max_new_tokens=5) for base in bases]
    assert answers[0] == answers[1]


def test_a_tuned_layer_on_disk_is_an_error(tmp_path: Path) -> None:
    everything = UPPER | {f"model.layers.{index}": "disk" for index in range(4)}
    with pytest.raises(PlacementError, match=r"model\.layers\.2"):
        load(saved(tmp_path), everything)


def test_a_model_that_is_gone_leaves_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scratch = saved(tmp_path / "model"), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    base = load(folder, LOWER_ON_DISK)
    assert list(scratch.iterdir())
    del base
    gc.collect()
    assert not list(scratch.iterdir())
