import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import FAMILIES, down_projection, tiny_base, tiny_model

from worker import checkpoint

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 269060552\n"
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


def test_weights_that_no_fingerprint_is_made_of_are_refused(model_dir: Path) -> None:
    for path in model_dir.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(checkpoint.CheckpointError, match=rf"{re.escape(str(model_dir))}.*safetensors"):
        checkpoint.fingerprint(model_dir)


def saved(folder: Path, family: str, **overrides: object) -> Path:
    tiny_model(family, **overrides).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj", "model.layers.2.mlp.down_proj.weight"])
def test_an_exact_location_is_kept(model_dir: Path, name: str) -> None:
    assert checkpoint.resolve_location(model_dir, name) == "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_is_the_down_projection_at_a_measured_relative_depth(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    location = checkpoint.resolve_location(saved(tmp_path, family, num_hidden_layers=10), "auto")
    assert location == down_projection(family, 8)
    model_type = json.loads((tmp_path / "config.json").read_bytes())["model_type"]
    assert caplog.messages == [
        f"auto_location location={location} reason=relative depth 24/30, measured on SmolLM2-135M; "
        f"not measured for this {model_type}"
    ]


def test_auto_says_nothing_of_other_models_for_the_one_it_was_measured_on(
    default_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert checkpoint.resolve_location(default_model, "auto") == "model.layers.24.mlp.down_proj"
    assert caplog.messages[0].endswith("reason=relative depth 24/30, measured on SmolLM2-135M")


def test_auto_is_the_papers_location_for_the_papers_models(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = {"model_type": "mistral", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}
    (model_dir / "config.json").write_text(json.dumps(config))
    assert checkpoint.resolve_location(model_dir, "auto") == "model.layers.23"
    assert "location=model.layers.23 reason=preset of Mistral-7B" in caplog.text


@pytest.mark.parametrize("name", ["transformer.h.{}.mlp.c_proj", "layers.{}.mlp.parts.0.fc2"])
def test_auto_reads_other_names_of_layers(model_dir: Path, name: str) -> None:
    weights = {f"{name.format(layer)}.weight": torch.ones(2, 3) for layer in range(5)}
    save_file(weights, model_dir / "model-00001.safetensors")
    assert checkpoint.resolve_location(model_dir, "auto") == name.format(4)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        pytest.param(["model.layers.0.mlp.out.weight"], "0 stacks of layers", id="no name that is known"),
        pytest.param(
            ["model.layers.0.mlp.experts.0.w2.weight", "model.layers.0.mlp.gate.weight"],
            "0 stacks of layers",
            id="routed experts only",
        ),
        pytest.param(
            ["vision.layers.0.mlp.fc2.weight", "text.layers.0.mlp.down_proj.weight"],
            r"2 stacks of layers.*\(text\.layers, vision\.layers\)",
            id="two towers",
        ),
        pytest.param(
            ["h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight"],
            r"h\.0 has 2 matrices.*h\.0\.attn\.c_proj\.weight, h\.0\.mlp\.c_proj\.weight",
            id="two of one name",
        ),
    ],
)
def test_auto_does_not_guess(model_dir: Path, names: list[str], reason: str) -> None:
    save_file({name: torch.ones(2, 3) for name in names}, model_dir / "model-00001.safetensors")
    with pytest.raises(checkpoint.UnknownLocationError, match=f"{reason}.*name the tuned location"):
        checkpoint.resolve_location(model_dir, "auto")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["", ".self_attn", ".mlp"])
def test_the_files_and_the_model_in_memory_agree_on_what_is_tuned(tmp_path: Path, family: str, part: str) -> None:
    location = f"model.layers.1{part}"
    base = tiny_base(family, location)
    base.model.save_pretrained(tmp_path)
    in_memory = {name: tuple(tensor.shape) for name, tensor in base.tuned_tensors().items()}
    assert checkpoint.location_shapes(tmp_path, location) == in_memory
    assert in_memory


def test_a_location_may_be_spread_over_files(tmp_path: Path) -> None:
    saved(tmp_path / "whole", "llama")
    tiny_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 4
    whole, sharded = (checkpoint.location_shapes(tmp_path / name, "model.layers.1") for name in ("whole", "sharded"))
    assert whole == sharded
    assert len(whole) == 7


def test_weights_beside_those_of_the_index_are_not_the_models(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="8KB")
    save_file({"layers.0.feed_forward.w2.weight": torch.ones(2, 3)}, tmp_path / "consolidated.safetensors")
    assert checkpoint.resolve_location(tmp_path, "auto") == "model.layers.3.mlp.down_proj"
    with pytest.raises(checkpoint.UnknownLocationError, match="matches no parameter"):
        checkpoint.location_shapes(tmp_path, "layers.0.feed_forward.w2")


@pytest.mark.parametrize(
    "location", ["model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.down_proj", DOWN_PROJ]
)
def test_a_locations_shapes_come_from_the_headers(model_dir: Path, location: str) -> None:
    assert checkpoint.location_shapes(model_dir, location) == {DOWN_PROJ: (2, 3)}


@pytest.mark.parametrize("location", ["model.layers.10.mlp.down_proj", "model.layers.1.mlp.down", "lm_head", "model"])
def test_a_location_the_model_does_not_have_is_named(model_dir: Path, location: str) -> None:
    with pytest.raises(checkpoint.UnknownLocationError, match=f"{re.escape(repr(location))}"):
        checkpoint.location_shapes(model_dir, location)


def test_a_folder_is_its_own_model(model_dir: Path) -> None:
    assert checkpoint.resolve_model(str(model_dir)) == model_dir


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.ModelNotFoundError, match=r"config\.json"):
        checkpoint.resolve_model(str(tmp_path))


def test_a_missing_model_is_named() -> None:
    with pytest.raises(checkpoint.ModelNotFoundError, match="/no/such/model"):
        checkpoint.resolve_model("/no/such/model")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ],
)
@pytest.mark.parametrize("content", [LFS_POINTER, "", '{"half": '])
def test_a_file_that_cannot_be_read_is_named(model_dir: Path, name: str, content: str) -> None:
    (model_dir / name).write_text(content)
    with pytest.raises(checkpoint.CheckpointError, match=re.escape(str(model_dir / name))):
        checkpoint.check_readable(model_dir)


def test_a_file_that_the_index_names_and_the_folder_lacks_is_named(model_dir: Path) -> None:
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "lost.safetensors"}}))
    with pytest.raises(checkpoint.CheckpointError, match=r"lost\.safetensors"):
        checkpoint.resolve_location(model_dir, "auto")


def test_half_of_the_weights_is_not_taken_for_all(model_dir: Path) -> None:
    path = model_dir / "model-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(checkpoint.CheckpointError, match=re.escape(str(path))):
        checkpoint.location_shapes(model_dir, DOWN_PROJ)
