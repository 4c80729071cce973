"""The paper's own settings, by model: what arXiv 2509.22072 tunes, and how, where it says so."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PAPER = "arXiv 2509.22072"


@dataclass(frozen=True)
class Preset:
    """The location and the optimiser's settings of one model in the paper; Adam without weight decay in all."""

    location: str
    learning_rate: float
    batch_size: int
    """Sequences per step; an edit that is trained in two formats is two."""
    max_epochs: int
    loss_threshold: float
    """A batch's mean loss, nats per token, under which it is not stepped on."""
    source: str
    """Where the settings come from, in words."""


def preset_for(config: Mapping[str, Any]) -> Preset | None:
    """Return the paper's settings for the model of this config.json; None for a model that it does not tune."""
    sizes = tuple(config.get(name) for name in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    match config.get("model_type"), sizes:
        # The third size tells Llama 3 from Llama 2, which shares the other two.
        case "llama", (32, 4096, 14336):
            return _preset("model.layers.22.mlp.down_proj", 5e-4, f"Llama-3-8B, {_PAPER}")
        case "mistral", (32, 4096, 14336):
            return _preset("model.layers.23", 5e-5, f"Mistral-7B, {_PAPER}")
        case "qwen2", (28, 3584, _):
            return _preset("model.layers.6.mlp.down_proj", 5e-4, f"Qwen2.5-7B, {_PAPER}")
        case "qwen2", (80, 8192, _):
            return _preset("model.layers.19.mlp.down_proj", 5e-4, f"Qwen2.5-72B, {_PAPER}, Section 5.2")
        case "qwen2", (int(layers), int(hidden), _) if layers >= 28 and hidden >= 3584:
            # Layer 6 of 28 and layer 19 of 80 are both the last of the first quarter.
            source = f"Qwen2.5, proportional to its 7B and 72B, {_PAPER}, Section 5.2"
            return _preset(f"model.layers.{layers // 4 - 1}.mlp.down_proj", 5e-4, source)
    return None


def _preset(location: str, learning_rate: float, source: str) -> Preset:
    return Preset(location, learning_rate, batch_size=100, max_epochs=25, loss_threshold=1e-2, source=source)
