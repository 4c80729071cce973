"""The base model on disk: where it is, which one it is, and which of its modules is tuned.

Everything here reads files and headers; nothing loads weights, so the node's launcher can use it without torch.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

# Layer 24 of the default model's 30: a narrow choice among the depths measured (benchmarks/results/defaults.md).
# Other depths of other models are set by naming the module.
_AUTO_DEPTH = (24, 30)


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
    """
    whole = hashlib.sha256()
    for path in [model_dir / "config.json", *sorted(model_dir.glob("*.safetensors"))]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.name} {digest}\n".encode())
    return whole.hexdigest()


def resolve_location(config: Mapping[str, Any], location: str) -> str:
    """Return the full name of the tuned module, such as `model.layers.24.mlp.down_proj`.

    `auto` is the MLP down-projection 24/30 of the way up the model. Any other value is an exact module name; the
    `.weight` of its parameter may follow it. Raises UnknownLocationError when `config` has no `num_hidden_layers` for
    `auto`; whether an exact name exists is `parameter_shape`'s question.
    """
    if location != "auto":
        return location.removesuffix(".weight")
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise UnknownLocationError("location 'auto' needs num_hidden_layers in config.json: name the module instead")
    numerator, denominator = _AUTO_DEPTH
    return f"model.layers.{layers * numerator // denominator}.mlp.down_proj"


def parameter_shape(model_dir: Path, parameter: str) -> tuple[int, ...]:
    """Return the shape of `parameter` (such as `model.layers.24.mlp.down_proj.weight`), from the file headers.

    Raises UnknownLocationError when no safetensors file of the model has it.
    """
    for path in sorted(model_dir.glob("*.safetensors")):
        header = _safetensors_header(path)
        if parameter in header:
            return tuple(header[parameter]["shape"])
    raise UnknownLocationError(f"the model in {model_dir} has no parameter {parameter!r}")


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Return the JSON header of a safetensors file: 8 bytes of little-endian length, then the header itself."""
    with path.open("rb") as file:
        size_bytes = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size_bytes))
    return header
