from pathlib import Path

import pytest
import torch
from tiny_models import tiny_base, tiny_model, tiny_tokenizer

from worker.checkpoint import CheckpointError, fingerprint
from worker.model import LocationError, load_base


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_is_loaded_frozen(checkpoint: Path) -> None:
    base = load_base(str(checkpoint), "model.layers.1.mlp.down_proj", device="cpu")
    assert (base.path, base.name, base.fingerprint) == (checkpoint, str(checkpoint), fingerprint(checkpoint))
    assert base.parameter_names == ("model.layers.1.mlp.down_proj.weight",)
    assert (base.layers_name, base.layer_index, base.device.type) == ("model.layers", 1, "cpu")
    assert base.model.dtype == torch.bfloat16
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert len(base.layers) == 4


def test_auto_names_an_exact_module(checkpoint: Path) -> None:
    base = load_base(str(checkpoint), device="cpu")
    assert base.parameter_names == (f"model.layers.{base.layer_index}.mlp.down_proj.weight",)


def test_no_token_is_added(checkpoint: Path) -> None:
    base = load_base(str(checkpoint), device="cpu")
    assert len(base.tokenizer) == len(tiny_tokenizer())
    assert base.model.get_input_embeddings().weight.shape == (260, 32)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no-such-folder"):
        load_base(str(tmp_path / "no-such-folder"))


def test_layers_2_is_not_layers_22() -> None:
    base = tiny_base(location="model.layers.2.mlp.down_proj", num_hidden_layers=23)
    assert base.parameter_names == ("model.layers.2.mlp.down_proj.weight",)
    assert base.layer_index == 2
    with pytest.raises(LocationError, match="matches no parameter"):
        tiny_base(location="model.layers.2.mlp.down")


def test_a_parameter_may_be_named_itself() -> None:
    base = tiny_base(location="model.layers.1.mlp.up_proj.weight")
    assert base.parameter_names == ("model.layers.1.mlp.up_proj.weight",)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("model.layers.9.mlp.down_proj", r"matches no parameter.*model\.layers\.0\.mlp\.down_proj\.weight"),
        ("layers.2.mlp.down_proj", "matches no parameter"),
        ("model.layers.2.mlp", r"matches 3 parameters.*gate_proj"),
        ("model.layers.2", r"matches 9 parameters.*9 in all"),
        ("model.layers.2.input_layernorm", r"not a matrix.*\(32,\)"),
        ("model.embed_tokens", "not inside a decoder layer"),
        ("", "matches no parameter"),
    ],
)
def test_a_location_that_is_not_exactly_one_matrix_of_a_layer_is_refused(location: str, message: str) -> None:
    with pytest.raises(LocationError, match=message):
        tiny_base(location=location)


def test_a_bias_makes_a_module_ambiguous() -> None:
    with pytest.raises(LocationError, match="matches 2 parameters"):
        tiny_base("qwen2", location="model.layers.2.self_attn.q_proj")
