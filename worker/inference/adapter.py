"""Versions as vLLM loads them: local adapter folders, made from verified versions and never rewritten."""

import itertools
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from service.manifest import Manifest
from worker.delta import StoreUnavailableError, VersionStore, tensor_sha256
from worker.folders import in_use

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterCache:
    """Adapter folders under `folder`, one for each base model, version and manifest."""

    store: VersionStore
    folder: Path
    fingerprint: str
    """Of the base model that the node serves."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of the parameters that a version must replace, by name."""
    retired: set[Path] = field(default_factory=set)
    """Folders that this process gives nobody any more."""

    def ensure(self, version: int) -> Path:
        """Return the version's adapter folder, made from the store unless an intact one is there. Blocking.

        Raises any DeltaError; StoreUnavailableError also when the cache itself cannot be written.
        """
        manifest = self.store.manifest(version)
        parent = self.folder / self.fingerprint[:16]
        try:
            # vLLM may have an old path's content in memory (vLLM issue 32718), so a damaged folder is left where it
            # is and the next number tried.
            for attempt in itertools.count():
                adapter = parent / f"{version:06d}-{manifest.checksum[:16]}-{attempt}"
                if adapter in self.retired:
                    continue
                if not adapter.exists():
                    _write(adapter, self.store.load(version, fingerprint=self.fingerprint, shapes=self.shapes))
                if _is_intact(adapter, manifest):
                    break
        except OSError as error:
            raise StoreUnavailableError(f"version {version} could not be cached: {error}") from error
        return adapter

    def retire(self, adapter: Path) -> None:
        """Have the version be read from another folder the next time.

        vLLM caches what a prompt's beginning computes by the folder that the matrices came from. Behind a slot that was
        damaged the cache is wrong, and the folder is not.
        """
        self.retired.add(adapter)


def _weight_name(parameter: str, matrix: str) -> str:
    return f"base_model.model.{parameter.removesuffix('.weight')}.{matrix}.weight"


def _write(adapter: Path, tensors: Mapping[str, Tensor]) -> None:
    """Make the adapter folder appear at once. Another process that makes the same one first is no error."""
    staging = adapter.with_name(f".{adapter.name}.{uuid.uuid4().hex}")
    staging.mkdir(parents=True)
    # The rank is nominal: A is the full [out, in] matrix, B is there because the loader wants one.
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "bias": "none"}
    config["target_modules"] = [parameter.removesuffix(".weight") for parameter in tensors]
    weights = {_weight_name(parameter, "lora_A"): tensor for parameter, tensor in tensors.items()}
    for parameter, tensor in tensors.items():
        weights[_weight_name(parameter, "lora_B")] = torch.zeros(tensor.size(0), 1, dtype=tensor.dtype)
    try:
        with in_use(staging):
            (staging / "adapter_config.json").write_text(json.dumps(config))
            # Not save_file: it reports a full disk as a SafetensorError.
            (staging / _WEIGHTS).write_bytes(safetensors.torch.save(weights))
            staging.rename(adapter)
    except OSError:
        if not adapter.exists():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_intact(adapter: Path, manifest: Manifest) -> bool:
    """Whether the folder still holds the version's matrices, bit for bit."""
    try:
        weights = safetensors.torch.load((adapter / _WEIGHTS).read_bytes())
        json.loads((adapter / "adapter_config.json").read_bytes())
        return all(
            tensor_sha256(weights[_weight_name(parameter, "lora_A")]) == stored.sha256
            for parameter, stored in manifest.tensors.items()
        )
    except (SafetensorError, KeyError, ValueError, FileNotFoundError):
        return False
