import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from worker import checkpoint

DOWN_PROJ = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 30}))
    save_file({DOWN_PROJ: torch.ones(2, 3)}, folder / "model-00001.safetensors")
    save_file({"lm_head.weight": torch.ones(4, 2)}, folder / "model-00002.safetensors")
    return folder


def test_fingerprint_is_of_content_and_not_of_place(model_dir: Path, tmp_path: Path) -> None:
    before = checkpoint.fingerprint(model_dir)
    (model_dir / "tokenizer.json").write_text("{}")
    moved = model_dir.rename(tmp_path / "moved")
    assert checkpoint.fingerprint(moved) == before


@pytest.mark.parametrize("name", ["config.json", "model-00002.safetensors"])
def test_fingerprint_changes_with_one_byte(model_dir: Path, name: str) -> None:
    before = checkpoint.fingerprint(model_dir)
    content = bytearray((model_dir / name).read_bytes())
    content[-1] ^= 1
    (model_dir / name).write_bytes(content)
    assert checkpoint.fingerprint(model_dir) != before


def test_fingerprint_tells_apart_files_that_swapped_names(model_dir: Path) -> None:
    before = checkpoint.fingerprint(model_dir)
    first, second = model_dir / "model-00001.safetensors", model_dir / "model-00002.safetensors"
    first.rename(model_dir / "aside")
    second.rename(first)
    (model_dir / "aside").rename(second)
    assert checkpoint.fingerprint(model_dir) != before


@pytest.mark.parametrize(
    ("layers", "location"),
    [(30, "model.layers.24.mlp.down_proj"), (32, "model.layers.25.mlp.down_proj"), (1, "model.layers.0.mlp.down_proj")],
)
def test_auto_is_a_relative_depth(layers: int, location: str) -> None:
    assert checkpoint.resolve_location({"num_hidden_layers": layers}, "auto") == location


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj", "model.layers.2.mlp.down_proj.weight"])
def test_an_exact_location_is_kept(name: str) -> None:
    assert checkpoint.resolve_location({}, name) == "model.layers.2.mlp.down_proj"


def test_auto_without_a_layer_count_is_refused() -> None:
    with pytest.raises(checkpoint.UnknownLocationError, match="num_hidden_layers"):
        checkpoint.resolve_location({}, "auto")


def test_a_parameters_shape_comes_from_the_headers(model_dir: Path) -> None:
    assert checkpoint.parameter_shape(model_dir, DOWN_PROJ) == (2, 3)


def test_a_parameter_the_model_does_not_have_is_named(model_dir: Path) -> None:
    with pytest.raises(checkpoint.UnknownLocationError, match=r"model\.layers\.10\.mlp"):
        checkpoint.parameter_shape(model_dir, "model.layers.10.mlp.down_proj.weight")


def test_a_folder_is_its_own_model(model_dir: Path) -> None:
    assert checkpoint.resolve_model(str(model_dir)) == model_dir


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.ModelNotFoundError, match=r"config\.json"):
        checkpoint.resolve_model(str(tmp_path))


def test_a_missing_model_is_named() -> None:
    with pytest.raises(checkpoint.ModelNotFoundError, match="/no/such/model"):
        checkpoint.resolve_model("/no/such/model")
