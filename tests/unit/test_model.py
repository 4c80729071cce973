from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, tiny_base, tiny_model, tiny_tokenizer
from torch import nn

from worker.checkpoint import CheckpointError, fingerprint
from worker.location import LocationError
from worker.model import freeze_base, load_base


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
    assert base.dtype == torch.bfloat16
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


def test_a_chat_template_with_todays_date_is_warned_of(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_base(str(checkpoint), device="cpu")
    assert "model.dated_chat_template" not in caplog.messages
    dated = tiny_tokenizer()
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(dated.chat_template)
    dated.save_pretrained(checkpoint)
    load_base(str(checkpoint), device="cpu")
    (warning,) = (record for record in caplog.records if record.message == "model.dated_chat_template")
    assert warning.model == str(checkpoint)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no-such-folder"):
        load_base(str(tmp_path / "no-such-folder"))


def test_layers_2_is_not_layers_22() -> None:
    base = tiny_base(location="model.layers.2.mlp.down_proj", num_hidden_layers=23)
    assert base.parameter_names == ("model.layers.2.mlp.down_proj.weight",)
    assert base.layer_index == 2
    with pytest.raises(LocationError, match="matches no parameter"):
        tiny_base(location="model.layers.2.mlp.down")


@pytest.mark.parametrize(
    ("location", "names"),
    [
        ("mlp.up_proj.weight", ["mlp.up_proj"]),
        ("self_attn.q_proj", ["self_attn.q_proj"]),
        ("mlp", ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]),
        ("self_attn", ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]),
    ],
)
def test_the_matrices_of_a_location_are_tuned_and_its_biases_are_not(location: str, names: list[str]) -> None:
    base = tiny_base("qwen2", f"model.layers.1.{location}")
    assert base.parameter_names == tuple(f"model.layers.1.{name}.weight" for name in names)
    assert base.layer_index == 1
    assert base.location == f"model.layers.1.{location}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_layer_is_its_linear_layers_but_for_experts_and_routers(family: str) -> None:
    base = tiny_base(family, "model.layers.2")
    layer = base.model.get_submodule("model.layers.2")
    linear = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    expected = linear - {"mlp.shared_expert_gate"}  # a Linear, but what it does is to route
    assert base.parameter_names == tuple(sorted(f"model.layers.2.{name}.weight" for name in expected))
    assert all(tensor.ndim == 2 for tensor in base.tuned_tensors().values())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_a_shared_expert_is_tuned_as_any_mlp() -> None:
    base = tiny_base("qwen2_moe", "model.layers.0.mlp.shared_expert.down_proj")
    assert base.parameter_names == ("model.layers.0.mlp.shared_expert.down_proj.weight",)


@pytest.mark.parametrize(
    ("family", "location", "message"),
    [
        ("llama", "model.layers.9.mlp.down_proj", r"matches no parameter.*model\.layers\.0\.mlp\.down_proj\.weight"),
        ("llama", "layers.2.mlp.down_proj", "matches no parameter"),
        ("llama", "model.layers.2.ml", "matches no parameter"),
        ("llama", "", "matches no parameter"),
        ("llama", "model.layers.2.input_layernorm", r"no matrix to tune.*input_layernorm\.weight \(32,\)"),
        ("qwen2", "model.layers.2.self_attn.q_proj.bias", r"no matrix to tune.*q_proj\.bias \(32,\)"),
        ("qwen2_moe", "model.layers.2.mlp.gate", "no matrix to tune.*routers stay frozen.*shared_expert"),
        ("qwen2_moe", "model.layers.2.mlp.shared_expert_gate", "no matrix to tune"),
        ("qwen2_moe", "model.layers.2.mlp.experts", r"no matrix to tune.*experts\.down_proj \(4, 32, 16\)"),
        ("llama", "model.layers", "neither a decoder layer nor inside one"),
        ("llama", "model.embed_tokens", "neither a decoder layer nor inside one"),
        ("llama", "model", "neither a decoder layer nor inside one"),
        ("llama", "lm_head", "neither a decoder layer nor inside one"),
    ],
)
def test_a_location_without_matrices_of_one_layer_is_refused(family: str, location: str, message: str) -> None:
    with pytest.raises(LocationError, match=message):
        tiny_base(family, location)


def test_a_matrix_that_no_linear_layer_multiplies_by_is_refused() -> None:
    model = tiny_model()
    model.get_submodule("model.layers.1.mlp").positions = nn.Embedding(7, 5)
    with pytest.raises(LocationError, match=r"positions\.weight is of a Embedding, not of a Linear"):
        freeze_base(model, tiny_tokenizer(), location="model.layers.1", path=Path(), name="", fingerprint="")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_quantised_weights_are_refused(dtype: torch.dtype) -> None:
    """What they mean is in the scales beside them."""
    model = tiny_model()
    layer = model.get_submodule("model.layers.1.mlp.down_proj")
    layer.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
    with pytest.raises(LocationError, match=rf"layers\.1\.mlp\.down_proj\.weight is quantised \({dtype}\)"):
        freeze_base(model, tiny_tokenizer(), location="model.layers.1", path=Path(), name="", fingerprint="")
