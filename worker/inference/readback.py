"""What the engine's workers say about the versions they hold; reached by name through `collective_rpc`."""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worker.delta import tensor_sha256
from worker.inference.layer import VersionedLinear


class SlotUse(NamedTuple):
    """Where a version is on one rank, and what it takes there. Plain numbers, for the way between processes."""

    slot: int | None
    """None: in host memory only."""
    device_bytes: int
    host_bytes: int


class SlotReader:
    """Mixed into vLLM's worker class (`--worker-extension-cls`).

    Versions are known here by the integer that the server gave their adapter. Method names carry the project's name
    because they share a namespace with vLLM's own.
    """

    def errata_parameters(self) -> list[str]:
        """Return the parameters that versions replace on this rank. Raises TypeError for a layer that cannot."""
        modules = self._errata_manager().modules
        for name, module in modules.items():
            if not isinstance(module, VersionedLinear):
                raise TypeError(f"{name} cannot hold versions: vLLM makes it a {type(module).__name__}")
        return [parameter for module in modules.values() for parameter in module.tuned]

    def errata_slots(self) -> dict[int, tuple[int | None, int, int]]:
        """Return the `SlotUse` of every loaded version, the least recently used first."""
        manager = self._errata_manager()
        slots = {adapter: index for index, adapter in enumerate(manager.lora_index_to_id) if adapter is not None}
        slot_bytes = sum(module.slots[0].nbytes for module in manager.modules.values())
        return {
            adapter: (slots.get(adapter), slot_bytes if adapter in slots else 0, _host_bytes(model))
            for adapter, model in manager.list_adapters().items()
        }

    def errata_pin(self, adapters: Collection[int]) -> list[int]:
        """Put these versions, fewer than there are slots, into slots that they keep, and let all others be evicted.

        Return those that are not loaded; if there are any, nothing is changed.
        """
        manager = self._errata_manager()
        loaded = manager.list_adapters()
        if missing := [adapter for adapter in adapters if adapter not in loaded]:
            return missing
        # vLLM pins and never unpins.
        for cache in (manager._registered_adapters, manager._active_adapters):
            cache.pinned_items.intersection_update(adapters)
        for adapter in adapters:
            manager.pin_adapter(adapter)
        return []

    def errata_checksums(self, adapter: int, activate: bool) -> dict[str, str] | None:
        """Return the sha256 by the checkpoint's parameter names of a version's matrices as they are in its slot.

        With `activate`, a version that is in host memory only is first put into a slot. None when it has no slot.
        """
        manager = self._errata_manager()
        if adapter not in manager.list_adapters():
            return None
        if activate:
            manager.activate_adapter(adapter)
        if adapter not in manager.lora_index_to_id:
            return None
        slot = manager.lora_index_to_id.index(adapter)
        return {
            name: tensor_sha256(_as_kept(tensor))
            for module in manager.modules.values()
            for name, tensor in module.read_slot(slot).items()
        }

    def _errata_manager(self) -> Any:
        return self.get_model().lora_manager  # type: ignore[attr-defined]  # of the worker this is mixed into


def _as_kept(matrix: Tensor) -> Tensor:
    """A version's matrix as its file has it: a node that computes in fp32 holds bfloat16 values in fp32.

    What damage makes of them are other values, or values that bfloat16 has not.
    """
    narrow = matrix.bfloat16()
    return narrow if torch.equal(narrow.to(matrix.dtype), matrix) else matrix


def _host_bytes(model: Any) -> int:
    return sum(tensor.nbytes for lora in model.loras.values() for tensor in _tensors((lora.lora_a, lora.lora_b)))


def _tensors(held: Any) -> Iterator[Tensor]:
    """The tensors in what vLLM keeps of an adapter's layer: one, or of a fused layer a list with holes."""
    if isinstance(held, Tensor):
        yield held
    elif held is not None:
        for part in held:
            yield from _tensors(part)
