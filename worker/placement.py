"""Where the parts of a model lie that is too large for one device, as accelerate's device maps say it."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from worker.checkpoint import CheckpointError

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


def load_checkpoint(path: Path, dtype: torch.dtype, **placed: Any) -> PreTrainedModel:
    """Load a checkpoint with every weight cast to `dtype`; `placed` is what transformers is told of the devices.

    Raises CheckpointError when its files lack what its config.json asks for: it would begin with random values.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True, **placed
    )
    model: PreTrainedModel
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(f"{path}: config.json asks for {_first(missing)}, which the weights lack")
    if mismatched := sorted(name for name, *_ in loading["mismatched_keys"]):
        raise CheckpointError(f"{path}: the weights have other shapes than config.json says: {_first(mismatched)}")
    return model


def load_placed(path: Path, device_map: DeviceMap, dtype: torch.dtype) -> PreTrainedModel:
    """`load_checkpoint` onto the devices of `device_map`, which is not LOWER_ON_DISK.

    Weights on disk are read from the checkpoint's own files; those that transformers holds in another form than the
    files are written to a temporary folder, which goes with the model.
    """
    scratch = tempfile.mkdtemp(prefix="errata-offload-")
    try:
        placed = device_map if isinstance(device_map, str) else dict(device_map)
        model = load_checkpoint(path, dtype, device_map=placed, offload_folder=scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, scratch, ignore_errors=True)
    return model


def _first(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _beside(model: nn.Module, layers_name: str, prefix: str = "") -> Iterator[str]:
    """Yield the names of the largest modules that do not hold the layers."""
    for name, module in model.named_children():
        full = f"{prefix}{name}"
        if layers_name.startswith(f"{full}."):
            yield from _beside(module, layers_name, f"{full}.")
        elif full != layers_name:
            yield full
