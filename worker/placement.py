"""Where the parts of a model lie that is too large for one device, as accelerate's device maps say it."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

DeviceMap = str | Mapping[str, int | str]
"""Devices by module, with `cpu` and `disk` among them; or `auto`, or LOWER_ON_DISK."""

LOWER_ON_DISK = "lower-on-disk"
"""The layers below the tuned one stay in the checkpoint's files, the rest is loaded to one device.

They run once per edit ever (worker.training.prefix), so reading them each time costs little, and a training step does
without them.
"""


class PlacementError(ValueError):
    """The tuned layer is not on a device."""


def lower_on_disk(model: nn.Module, layers_name: str, layer_index: int, device: torch.device) -> dict[str, str]:
    """Return the device map that LOWER_ON_DISK stands for; `model` may be an empty one, on the meta device."""
    layers = model.get_submodule(layers_name)
    lower = {f"{layers_name}.{index}": "disk" for index in range(layer_index)}
    upper = {f"{layers_name}.{index}": str(device) for index in range(layer_index, len(list(layers.children())))}
    return lower | upper | {name: str(device) for name in _beside(model, layers_name)}


def load_placed(path: Path, device_map: DeviceMap, dtype: torch.dtype) -> PreTrainedModel:
    """Load a checkpoint onto the devices of `device_map`, which is not LOWER_ON_DISK.

    Weights on disk are read from the checkpoint's own files; those that transformers holds in another form than the
    files are written to a temporary folder, which goes with the model.
    """
    scratch = tempfile.mkdtemp(prefix="errata-offload-")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=False,
            device_map=device_map if isinstance(device_map, str) else dict(device_map),
            offload_folder=scratch,
        )
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, scratch, ignore_errors=True)
    return model


def _beside(model: nn.Module, layers_name: str, prefix: str = "") -> Iterator[str]:
    """Yield the names of the largest modules that do not hold the layers."""
    for name, module in model.named_children():
        full = f"{prefix}{name}"
        if layers_name.startswith(f"{full}."):
            yield from _beside(module, layers_name, f"{full}.")
        elif full != layers_name:
            yield full
