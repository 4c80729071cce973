"""The base model on disk: where it is, which one it is, and which of its matrices are tuned.

Everything here reads files and headers; nothing loads weights, so the node's launcher can use it without torch.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from worker.location import LocationError, down_projection, matrices
from worker.presets import preset_for

logger = logging.getLogger(__name__)

# Layer 24 of the default model's 30: a narrow choice among the depths measured (benchmarks/results/defaults.md).
# Other depths of other models are set by naming the location.
_AUTO_DEPTH = (24, 30)
_MEASURED = {"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576}


class CheckpointError(Exception):
    """A base model that cannot be used as asked."""


class ModelNotFoundError(CheckpointError):
    """Neither a folder nor a model that the Hugging Face hub or its local cache has."""


class UnknownLocationError(CheckpointError):
    """A tuned location that the model does not have."""


def resolve_model(model: str) -> Path:
    """Return the local folder of `model`: itself if it is a folder, else the hub's snapshot, downloaded when absent.

    Raises ModelNotFoundError, naming `model`.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.model"]))
        except (HFValidationError, HfHubHTTPError, OSError) as error:
            raise ModelNotFoundError(
                f"model {model!r} is neither a folder nor available from the hub: {error}"
            ) from error
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(f"model {model!r} has no config.json in {folder}")
    return folder


def read_config(model_dir: Path) -> dict[str, Any]:
    """Return the model's config.json."""
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_bytes())
    return config


def fingerprint(model_dir: Path) -> str:
    """Return the sha256, in hex, of the model's identity: config.json and the content of every safetensors file.

    Files are streamed. Tokenizer files are left out: they do not change what a delta replaces.

    Raises CheckpointError for a model whose weights are in no safetensors file.
    """
    whole = hashlib.sha256()
    weights = sorted(model_dir.glob("*.safetensors"))
    if not weights:
        # transformers would load them from other files, which could change under the same fingerprint.
        raise CheckpointError(f"the model in {model_dir} has no weights as *.safetensors; save it in that format")
    for path in [model_dir / "config.json", *weights]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name} {digest}\n".encode())
    return whole.hexdigest()


def resolve_location(model_dir: Path, location: str) -> str:
    """Return the full name of the tuned parameter's module, module or layer, such as `model.layers.24.mlp.down_proj`.

    `auto` is the preset of a model that has one, else the MLP down-projection 24/30 of the way up the model; what was
    chosen, and why, is logged. Any other value is an exact name; a parameter's `.weight` is left out. Raises
    UnknownLocationError when the model's tensor names do not show a down-projection for `auto`; whether an exact name
    exists is `location_shapes`'s question.
    """
    if location != "auto":
        return location.removesuffix(".weight")
    config = read_config(model_dir)
    preset = preset_for(config)
    if preset:
        chosen, reason = preset.location, f"preset of {preset.source}"
    else:
        try:
            chosen = down_projection(_shapes(model_dir), _AUTO_DEPTH)
        except LocationError as error:
            raise UnknownLocationError(f"the model in {model_dir}: {error}") from error
        reason = "relative depth {}/{}, measured on SmolLM2-135M".format(*_AUTO_DEPTH)
        if any(config.get(name) != value for name, value in _MEASURED.items()):
            reason += f"; not measured for this {config.get('model_type')}"
    logger.info("auto_location location=%s reason=%s", chosen, reason)
    return chosen


def location_shapes(model_dir: Path, location: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices that are tuned at `location`, by parameter name, from the file headers.

    Raises UnknownLocationError when `location` is no linear matrices of one decoder layer.
    """
    shapes = _shapes(model_dir)
    try:
        return {name: shapes[name] for name in matrices(shapes, location)}
    except LocationError as error:
        raise UnknownLocationError(f"the model in {model_dir}: {error}") from error


def _shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all of the model's parameters by name."""
    return {
        name: tuple(tensor["shape"])
        for path in _weight_files(model_dir)
        for name, tensor in _safetensors_header(path).items()
        if name != "__metadata__"
    }


def _weight_files(model_dir: Path) -> list[Path]:
    """Return the files of the weights. Some models keep a second copy, under other names, beside those in the index."""
    index = model_dir / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(model_dir.glob("*.safetensors"))
    files: set[str] = set(json.loads(index.read_bytes())["weight_map"].values())
    return [model_dir / name for name in sorted(files)]


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Return the JSON header of a safetensors file: 8 bytes of little-endian length, then the header itself."""
    with path.open("rb") as file:
        size_bytes = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size_bytes))
    return header
