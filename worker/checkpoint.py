"""The base model on disk: where it is, which one it is, and which of its matrices are tuned.

Everything here reads files and headers; nothing loads weights, so the node's launcher can use it without torch. A file
that is damaged or, say, a Git LFS pointer is a CheckpointError that names it.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

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
    """Return the model's config.json. Raises CheckpointError when it is no JSON object."""
    return _json_object(model_dir / "config.json")


def check_readable(model_dir: Path) -> None:
    """Read the model's configuration, the tokenizer's and the headers of the weights, for whoever names no file.

    Raises CheckpointError, naming the file that cannot be read.
    """
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (model_dir / name).is_file():
            _json_object(model_dir / name)
    _shapes(model_dir)


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
    return {name: shape for path in _weight_files(model_dir) for name, shape in _shapes_in(path).items()}


def _weight_files(model_dir: Path) -> list[Path]:
    """Return the files of the weights. Some models keep a second copy, under other names, beside those in the index."""
    index = model_dir / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(model_dir.glob("*.safetensors"))
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map")
    return [model_dir / name for name in sorted(set(weight_map.values()))]


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a safetensors file by name, from its header."""
    try:
        with safe_open(path, framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found
