import pytest

from worker.presets import preset_for

LLAMA_3_8B = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336}
MISTRAL_7B = {**LLAMA_3_8B, "model_type": "mistral"}


def qwen(layers: int, hidden: int) -> dict[str, object]:
    return {"model_type": "qwen2", "num_hidden_layers": layers, "hidden_size": hidden}


@pytest.mark.parametrize(
    ("config", "location", "learning_rate"),
    [
        (LLAMA_3_8B, "model.layers.22.mlp.down_proj", 5e-4),
        (qwen(28, 3584), "model.layers.6.mlp.down_proj", 5e-4),
        (MISTRAL_7B, "model.layers.23", 5e-5),
        (qwen(80, 8192), "model.layers.19.mlp.down_proj", 5e-4),
        pytest.param(qwen(48, 5120), "model.layers.11.mlp.down_proj", 5e-4, id="Qwen2.5-14B"),
        pytest.param(qwen(64, 5120), "model.layers.15.mlp.down_proj", 5e-4, id="Qwen2.5-32B"),
    ],
)
def test_the_papers_models_have_the_papers_settings(
    config: dict[str, object], location: str, learning_rate: float
) -> None:
    preset = preset_for(config)
    assert preset is not None
    assert (preset.location, preset.learning_rate) == (location, learning_rate)
    assert (preset.batch_size, preset.max_epochs, preset.loss_threshold) == (100, 25, 1e-2)
    assert "arXiv 2509.22072" in preset.source


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="empty"),
        pytest.param({"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576}, id="SmolLM2-135M"),
        pytest.param({**LLAMA_3_8B, "intermediate_size": 11008}, id="Llama-2-7B"),
        pytest.param({**LLAMA_3_8B, "model_type": "granite"}, id="sizes of another family"),
        pytest.param(qwen(24, 896), id="Qwen2.5-0.5B"),
        pytest.param(qwen(28, 1536), id="Qwen2.5-1.5B"),
        pytest.param(qwen(36, 2048), id="Qwen2.5-3B"),
    ],
)
def test_other_models_have_no_preset(config: dict[str, object]) -> None:
    assert preset_for(config) is None
