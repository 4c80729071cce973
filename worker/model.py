"""The frozen base model and the one place in it that is tuned.

Knows nothing of edits, settings, stores or servers. The base's weights are never written to after loading: training and
evaluation swap tuned tensors in for the length of a call (`worker.training.partial_forward`).
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from worker.checkpoint import CheckpointError, check_readable, fingerprint, resolve_location, resolve_model
from worker.location import LocationError, matrices
from worker.placement import LOWER_ON_DISK, DeviceMap, PlacementError, load_checkpoint, load_placed, lower_on_disk
from worker.precision import compute_dtype

log = logging.getLogger(__name__)

_TUNABLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A loaded causal language model, in evaluation mode, every parameter frozen.

    `location` is the parameter, module or layer that is tuned, by its exact name; `parameter_names` are the names of
    its matrices in the state dict, sorted; `layers_name` is the list of decoder layers, `layer_index` the tuned layer's
    place in it. `dtype` is what a version's tensors have; the model computes in its own, which holds every value of it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    name: str
    fingerprint: str
    location: str
    parameter_names: tuple[str, ...]
    layers_name: str
    layer_index: int
    device: torch.device
    dtype: torch.dtype

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in the order in which the model runs them."""
        layers = self.model.get_submodule(self.layers_name)
        if not isinstance(layers, nn.ModuleList):
            raise LocationError(f"{self.layers_name} is no list of decoder layers")
        return layers

    def tuned_tensors(self) -> dict[str, Tensor]:
        """The base's own values of the tuned tensors, as a version has them (no copies if the model does too)."""
        return {name: self.model.get_parameter(name).to(self.dtype) for name in self.parameter_names}


def load_base(
    path_or_hub_id: str,
    location: str = "auto",
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device_map: DeviceMap | None = None,
) -> BaseModel:
    """Load a causal language model and freeze it.

    Args:
        path_or_hub_id: folder of a Hugging Face checkpoint, or its name on the hub.
        location: exact name of the tuned parameter, module or decoder layer, or "auto".
        device: torch device; by default the GPU if there is one, else the CPU.
        dtype: what versions are kept and, where the device can, computed in; see `compute_dtype`.
        device_map: spreads the model over several devices and the disk; None loads it whole to `device`.

    Raises:
        PlacementError: the device map leaves the tuned layer on disk.
        LocationError: `location` is no linear matrices of one decoder layer, or their weights are quantised.
        CheckpointError: there is no such model, its files cannot be read or do not fit each other, or "auto" finds no
            location in it.
        OSError, ValueError: the model cannot be read.
    """
    path = resolve_model(path_or_hub_id)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_readable(path)
    tokenizer = _tokenizer(path)
    if "strftime_now" in str(tokenizer.chat_template):
        # What is computed of a prompt once ever is computed anew each day, to other bits.
        log.warning("model.dated_chat_template", extra={"model": path_or_hub_id})
    location = resolve_location(path, location)
    computed_in = compute_dtype(dtype, target.type)
    model: PreTrainedModel
    if device_map is None:
        model = load_checkpoint(path, computed_in)
        nn.Module.to(model, target)
    else:
        below = _lower_on_disk(path, location, target) if device_map == LOWER_ON_DISK else device_map
        model = load_placed(path, below, computed_in)
    return freeze_base(
        model,
        tokenizer,
        location=location,
        path=path,
        name=path_or_hub_id,
        fingerprint=fingerprint(path),
        dtype=dtype,
    )


def freeze_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    location: str,
    path: Path,
    name: str,
    fingerprint: str,
    dtype: torch.dtype | None = None,
) -> BaseModel:
    """Freeze a model that is already in memory. `location` must be exact; see `load_base` for the rest.

    `dtype` is the model's own unless given.
    """
    model.eval()
    model.requires_grad_(requires_grad=False)
    parameter_names = _linear_weights(model, location)
    layers_name, layer_index = _decoder_layer(model, parameter_names[0])
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        # transformers' other kernels leave the cap out, without a word.
        model.set_attn_implementation("eager")
    if model.get_parameter(parameter_names[0]).is_meta:
        raise PlacementError(f"the device map leaves the tuned layer, {layers_name}.{layer_index}, on disk")
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        path=path,
        name=name,
        fingerprint=fingerprint,
        location=location,
        parameter_names=parameter_names,
        layers_name=layers_name,
        layer_index=layer_index,
        device=model.get_parameter(parameter_names[0]).device,
        dtype=dtype or model.dtype,
    )


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):
        raise
    except Exception as error:
        # What the tokenizers library and the checks of a configuration raise has no class that says what it is.
        raise CheckpointError(f"the configuration or the tokenizer in {path} cannot be read: {error}") from error
    return tokenizer


def _lower_on_disk(path: Path, location: str, device: torch.device) -> DeviceMap:
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return lower_on_disk(empty, *_decoder_layer(empty, _linear_weights(empty, location)[0]), device)


def _linear_weights(model: nn.Module, location: str) -> tuple[str, ...]:
    names = matrices({name: tuple(parameter.shape) for name, parameter in model.named_parameters()}, location)
    for name in names:
        # A node multiplies by [out, in] matrices; an embedding, or a layer that keeps [in, out], is something else.
        module = model.get_submodule(name.removesuffix(".weight"))
        if not isinstance(module, nn.Linear):
            raise LocationError(f"tuned location {location!r}: {name} is of a {type(module).__name__}, not of a Linear")
        dtype = model.get_parameter(name).dtype
        if dtype not in _TUNABLE:
            # Such values mean nothing without the scales that lie beside them.
            raise LocationError(f"tuned location {location!r}: {name} is quantised ({dtype}), which cannot be tuned")
    return names


def _decoder_layer(model: nn.Module, parameter_name: str) -> tuple[str, int]:
    parts = parameter_name.split(".")
    # The outermost list is the stack of layers; one further in would be, say, the experts of a layer.
    for depth in range(1, len(parts) - 1):
        name = ".".join(parts[:depth])
        if isinstance(model.get_submodule(name), nn.ModuleList):
            return name, int(parts[depth])
    raise LocationError(f"tuned location {parameter_name!r} is not inside a decoder layer")
