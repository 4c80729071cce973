"""Which adapters vLLM puts into slots for a batch, over its own manager of adapters, on no device."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.utils import convert_mapping
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.outputs import RequestOutput
from vllm.v1.worker.gpu.lora_utils import LoraState
from vllm.v1.worker.gpu_input_batch import InputBatch

from worker.inference.readback import SlotReader
from worker.inference.turns import Turns

SLOTS, HOST_SLOTS = 4, 16


class Worker(SlotReader):
    """A worker of the engine with vLLM's manager of adapters, over a model without tuned layers."""

    def __init__(self, needed: Callable[[list[LoRARequest]], set[LoRARequest]]) -> None:
        self._needed = needed
        manager = LRUCacheLoRAModelManager.__new__(LRUCacheLoRAModelManager)
        manager.lora_config = SimpleNamespace(max_cpu_loras=HOST_SLOTS, max_loras=SLOTS)
        manager._registered_adapters = AdapterLRUCache(HOST_SLOTS, manager.deactivate_adapter)
        manager._active_adapters = AdapterLRUCache(SLOTS, manager._deactivate_adapter)
        manager.lora_index_to_id = [None] * SLOTS
        manager.modules = {}
        manager._last_mapping = manager._last_slot_layout = None
        manager._add_adapter = lambda lora: manager._registered_adapters.__setitem__(lora.id, lora)
        manager._set_adapter_mapping = lambda mapping: convert_mapping(
            mapping, manager.lora_index_to_id, SLOTS + 1, 100, torch.device("cpu")
        )
        self.adapters = LRUCacheWorkerLoRAManager.__new__(LRUCacheWorkerLoRAManager)
        self.adapters._adapter_manager = manager
        self.adapters._load_adapter = lambda request: SimpleNamespace(id=request.lora_int_id)

    def get_model(self) -> SimpleNamespace:
        return SimpleNamespace(lora_manager=self.adapters._adapter_manager)

    def step(self, *requests: LoRARequest) -> None:
        """As vLLM's model runners do; raises KeyError where a request's adapter has no slot."""
        mapping = tuple(request.lora_int_id for request in requests)
        self.adapters.set_active_adapters(self._needed(list(requests)), LoRAMapping(mapping, mapping))


def needed_v1(requests: list[LoRARequest]) -> set[LoRARequest]:
    numbers, each = [request.lora_int_id for request in requests], np.ones(len(requests), dtype=np.int32)
    batch = SimpleNamespace(
        request_lora_mapping=np.array(numbers),
        num_reqs=len(requests),
        lora_id_to_lora_request=dict(zip(numbers, requests, strict=True)),
    )
    return InputBatch.make_lora_inputs(batch, each, each)[2]


def needed_v2(requests: list[LoRARequest]) -> set[LoRARequest]:
    by_id = {str(at): request for at, request in enumerate(requests)}
    return LoraState.get_activate_loras(SimpleNamespace(lora_requests=by_id), list(by_id))


async def as_asked(turns: Turns, *requests: LoRARequest) -> list[LoRARequest]:
    """The requests as they come to the engine."""
    asked = []

    async def generate(*, lora_request: LoRARequest) -> AsyncIterator[RequestOutput]:
        asked.append(lora_request)
        await asyncio.sleep(0)
        return
        yield

    adapters = SimpleNamespace(knows=lambda _: True)
    for request in requests:
        assert [output async for output in turns.in_turn(generate, adapters)(lora_request=request)] == []
    return asked


@pytest.mark.parametrize("needed", [needed_v1, needed_v2])
async def test_an_evicted_version_that_still_answers_keeps_its_slot_beside_the_one_loaded_again(
    needed: Callable[[list[LoRARequest]], set[LoRARequest]],
) -> None:
    worker = Worker(needed)
    active, previous, old, again, other = await as_asked(
        Turns(SLOTS),
        LoRARequest("errata@9", 1, "/cache/9-0"),
        LoRARequest("errata@8", 2, "/cache/8-0"),
        LoRARequest("errata@7", 3, "/cache/7-0"),
        LoRARequest("errata@7", 4, "/cache/7-1"),
        LoRARequest("errata@5", 5, "/cache/5-0"),
    )
    for request in (active, previous, old):
        worker.adapters.add_adapter(request)
    worker.errata_pin([1, 2])
    worker.step(active, old)
    worker.adapters.add_adapter(again)
    for _ in range(2):
        worker.step(active, old, again)
    worker.adapters.add_adapter(other)
    worker.step(active, old, again)
