"""What a worker of the engine says of the versions it holds, over a stand-in for vLLM's manager of adapters."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.utils.cache import LRUCache

from worker.delta import tensor_sha256
from worker.inference.layer import VersionedLinear
from worker.inference.readback import SlotReader

Q, K, O = (f"model.layers.2.self_attn.{name}_proj.weight" for name in "qko")  # noqa: E741
HOST_ONLY, IN_SLOT_1 = 5, 6


class Layer(VersionedLinear):
    """Holds what it is given, in slot 1."""

    def __init__(self, matrices: dict[str, Tensor]) -> None:
        nn.Module.__init__(self)
        self.tuned, self._held = tuple(matrices), matrices

    @property
    def slots(self) -> Tensor:
        rows = sum(matrix.shape[0] for matrix in self._held.values())
        return torch.zeros(2, rows, 3)

    def read_slot(self, index: int) -> dict[str, Tensor]:
        return {name: matrix if index == 1 else torch.zeros_like(matrix) for name, matrix in self._held.items()}


def adapter(number: int) -> LoRAModel:
    fused = PackedLoRALayerWeights("qkv_proj", 1, [1, 1, 1], [torch.ones(2, 3)] * 2 + [None], [torch.ones(2, 1)] * 3)
    plain = LoRALayerWeights("o_proj", 1, 1, torch.ones(2, 3), torch.ones(2, 1))
    return LoRAModel(number, 1, {"qkv_proj": fused, "o_proj": plain})


@dataclass
class Manager:
    modules: dict[str, object]
    lora_index_to_id: list[int | None] = field(default_factory=lambda: [None, IN_SLOT_1])
    _registered_adapters: LRUCache[int, LoRAModel] = field(default_factory=lambda: LRUCache(4))
    _active_adapters: LRUCache[int, None] = field(default_factory=lambda: LRUCache(2))

    def __post_init__(self) -> None:
        for number in (HOST_ONLY, IN_SLOT_1):
            self._registered_adapters[number] = adapter(number)

    def list_adapters(self) -> dict[int, LoRAModel]:
        return dict(self._registered_adapters.cache)

    def pin_adapter(self, lora_id: int) -> None:
        self.activate_adapter(lora_id)
        self._active_adapters[lora_id] = None
        self._registered_adapters.pin(lora_id)
        self._active_adapters.pin(lora_id)

    def activate_adapter(self, lora_id: int) -> None:
        if lora_id not in self.lora_index_to_id:
            self.lora_index_to_id[0] = lora_id


class Worker(SlotReader):
    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def _errata_manager(self) -> Manager:
        return self._manager


def slots(worker: Worker) -> dict[int, int | None]:
    return {number: slot for number, (slot, _, _) in worker.errata_slots().items()}


# bfloat16 values in fp32, as on a CPU without bfloat16.
MATRICES = {name: torch.full((2, 3), float(at + 1)) for at, name in enumerate((Q, K, O))}


@pytest.fixture
def worker() -> Worker:
    fused = Layer({name: MATRICES[name] for name in (Q, K)})
    return Worker(Manager({"qkv_proj": fused, "o_proj": Layer({O: MATRICES[O]})}))


def test_parameters_are_those_of_the_checkpoint(worker: Worker) -> None:
    assert worker.errata_parameters() == [Q, K, O]


def test_a_layer_that_cannot_hold_versions_is_named(worker: Worker) -> None:
    worker._manager.modules["model.layers.2.mlp.gate"] = nn.Identity()
    with pytest.raises(TypeError, match=r"model\.layers\.2\.mlp\.gate cannot hold versions.*Identity"):
        worker.errata_parameters()


def test_checksums_are_by_parameter_over_all_layers(worker: Worker) -> None:
    expected = {name: tensor_sha256(matrix.bfloat16()) for name, matrix in MATRICES.items()}
    assert worker.errata_checksums(IN_SLOT_1, False) == expected


@pytest.mark.parametrize("bit", [0, 15, 16, 22, 30, 31])
def test_a_flipped_bit_is_seen_in_each_half_of_a_wider_value(bit: int) -> None:
    held = MATRICES[O].clone()
    flipped = held.view(torch.int32)
    flipped[1, 2] ^= 1 << bit if bit < 31 else -(1 << 31)
    found = Worker(Manager({"o_proj": Layer({O: held})})).errata_checksums(IN_SLOT_1, False)
    assert found is not None
    assert found[O] != tensor_sha256(MATRICES[O].bfloat16())


def test_what_bfloat16_has_not_is_read_back_as_it_is() -> None:
    held = torch.full((2, 3), 1 / 3)
    found = Worker(Manager({"o_proj": Layer({O: held})})).errata_checksums(IN_SLOT_1, False)
    assert found == {O: tensor_sha256(held)}


def test_a_version_in_host_memory_takes_a_slot_only_when_asked_to(worker: Worker) -> None:
    assert worker.errata_checksums(HOST_ONLY, False) is None
    assert slots(worker) == {HOST_ONLY: None, IN_SLOT_1: 1}
    zeros = tensor_sha256(torch.zeros(2, 3).bfloat16())
    assert worker.errata_checksums(HOST_ONLY, True) == dict.fromkeys((Q, K, O), zeros)
    assert slots(worker) == {HOST_ONLY: 0, IN_SLOT_1: 1}
    assert worker.errata_checksums(7, True) is None


def test_memory_is_counted_where_it_is(worker: Worker) -> None:
    of_float = 4
    host = of_float * (3 * 2 * 3 + 4 * 2)
    assert worker.errata_slots() == {HOST_ONLY: (None, 0, host), IN_SLOT_1: (1, of_float * 3 * 2 * 3, host)}


def test_what_is_pinned_has_a_slot_and_what_was_is_free_again(worker: Worker) -> None:
    manager = worker._errata_manager()
    assert worker.errata_pin([HOST_ONLY]) == []
    assert slots(worker) == {HOST_ONLY: 0, IN_SLOT_1: 1}
    assert worker.errata_pin([IN_SLOT_1]) == []
    for cache in (manager._registered_adapters, manager._active_adapters):
        assert cache.pinned_items == {IN_SLOT_1}


def test_what_is_not_loaded_is_named_and_nothing_is_pinned(worker: Worker) -> None:
    assert worker.errata_pin([IN_SLOT_1]) == []
    assert worker.errata_pin([HOST_ONLY, 7]) == [7]
    assert worker._errata_manager()._active_adapters.pinned_items == {IN_SLOT_1}
