"""What the server and its engine hold between them, over stand-ins for both."""

import asyncio
import contextlib
from dataclasses import dataclass, field

import pytest
from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest
from vllm.lora.request import LoRARequest

from worker.inference.residents import NotResidentError, ResidentVersions
from worker.inference.turns import Turns

Q, K = "model.layers.2.self_attn.q_proj.weight", "model.layers.2.self_attn.k_proj.weight"
SLOTS, HOST_SLOTS = 3, 3


@dataclass
class Engine:
    """Holds adapters by number, the least recently used first."""

    held: list[int]
    parameters: list[list[str]] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)
    ranks: int = 1

    async def collective_rpc(self, method: str, args: tuple[list[int]] = ([],)) -> list[object]:
        if method == "errata_pin":
            if missing := [adapter for adapter in args[0] if adapter not in self.held]:
                return [missing] * self.ranks
            self.pinned = args[0]
            return [[]] * self.ranks
        use = {adapter: (None if at else 0, 0 if at else 10, 30) for at, adapter in enumerate(self.held)}
        return {"errata_slots": [use] * self.ranks, "errata_parameters": self.parameters}[method]

    async def remove_lora(self, lora_id: int) -> None:
        self.held.remove(lora_id)


@dataclass
class Models:
    """Knows versions by name; version 7's adapter has the number 7."""

    lora_requests: dict[str, LoRARequest]

    async def resolve_lora(self, name: str) -> LoRARequest:
        return self.lora_requests.setdefault(name, LoRARequest(name, int(name.removeprefix("errata@")) + 10, "/again"))

    async def unload_lora_adapter(self, request: UnloadLoRAAdapterRequest) -> None:
        del self.lora_requests[request.lora_name]


def residents(
    held: list[int], named: list[int], parameters: list[list[str]] | None = None, ranks: int = 1
) -> ResidentVersions:
    models = Models({f"errata@{number}": LoRARequest(f"errata@{number}", number, "/adapter") for number in named})
    return ResidentVersions(Engine(held, parameters or [], ranks=ranks), models, Turns(SLOTS), HOST_SLOTS)


@pytest.mark.parametrize(
    ("held", "named", "left"),
    [
        pytest.param([1, 2], [1, 2], [1, 2], id="there is room"),
        pytest.param([2, 1, 3], [1, 2, 3], [1, 3], id="the least recently used goes"),
        pytest.param([2, 3], [1, 2, 3], [2, 3], id="the engine has evicted by itself"),
        pytest.param([2, 3, 4], [1, 2, 3, 4], [3, 4], id="both"),
    ],
)
async def test_room_is_made_in_engine_and_server_alike(held: list[int], named: list[int], left: list[int]) -> None:
    versions = residents(held, named)
    await versions.make_room()
    assert sorted(versions._engine.held) == left
    assert sorted(request.lora_int_id for request in versions._models.lora_requests.values()) == left


@pytest.mark.parametrize("ranks", [[[]], [[K]], [[K], [K]], [[K, Q, "model.layers.3.mlp.down_proj.weight"]]])
async def test_parameters_that_vllm_does_not_hold_or_holds_besides_stop_the_node(ranks: list[list[str]]) -> None:
    with pytest.raises(LookupError, match=rf"not of \['{K}', '{Q}'\]"):
        await residents([], [], ranks).check_parameters({K, Q})


@pytest.mark.parametrize("ranks", [[[Q, K]], [[], [Q, K]], [[Q], [K]], [[Q, K], [Q, K]]])
async def test_every_parameter_on_one_rank_is_enough(ranks: list[list[str]]) -> None:
    await residents([], [], ranks).check_parameters({K, Q})


async def test_room_is_not_made_of_what_is_pinned() -> None:
    versions = residents([2, 1, 3], [1, 2, 3])
    await versions.pin({2})
    assert versions._engine.pinned == [2]
    await versions.make_room()
    assert versions._engine.held == [2, 3]


async def test_what_is_not_loaded_cannot_be_pinned_and_changes_nothing() -> None:
    versions = residents([1, 2], [1, 2, 3])
    await versions.pin({1})
    for missing in (3, 4):
        with pytest.raises(NotResidentError, match=f"version {missing} "):
            await versions.pin({1, missing})
    assert (versions._engine.pinned, [found.pinned for found in await versions.list(checksum=False)]) == (
        [1],
        [True, False],
    )


async def test_an_evicted_version_is_pinned_no_more() -> None:
    versions = residents([1, 2], [1, 2])
    await versions.pin({1, 2})
    await versions.evict(1)
    assert versions._turns.pinned == {2}


async def test_an_evicted_version_leaves_the_engine_when_its_requests_have_ended() -> None:
    versions = residents([1, 2], [1, 2])
    request = versions._models.lora_requests["errata@1"]
    async with versions._turns.turn(1):
        eviction = asyncio.create_task(versions.evict(1))
        for _ in range(5):
            await asyncio.sleep(0)
        assert (versions._engine.held, eviction.done()) == ([1, 2], False)
        assert not versions.knows(request)
    await eviction
    assert versions._engine.held == [2]


async def test_a_version_that_comes_again_while_it_leaves_is_another_adapter() -> None:
    versions = residents([1], [1])
    request = versions._models.lora_requests["errata@1"]
    async with versions._turns.turn(1):
        eviction = asyncio.create_task(versions.evict(1))
        await asyncio.sleep(0)
        assert not versions.knows(request)
        again = await versions.renewed(request)
        versions._engine.held.append(again.lora_int_id)
    await eviction
    assert (versions._engine.held, versions.knows(again), versions.knows(request)) == ([11], True, False)


@pytest.mark.parametrize(("in_flight", "left"), [([2], [2, 3]), ([2, 1], [1, 2]), ([1, 2, 3], [1, 3])])
async def test_room_is_made_of_what_is_not_in_use_or_of_what_ends(in_flight: list[int], left: list[int]) -> None:
    versions = residents([2, 1, 3], [1, 2, 3])
    async with contextlib.AsyncExitStack() as turns:
        for adapter in in_flight:
            await turns.enter_async_context(versions._turns.turn(adapter))
        made = asyncio.create_task(versions.make_room())
        for _ in range(5):
            await asyncio.sleep(0)
        if made.done():
            assert sorted(versions._engine.held) == left
        else:
            assert sorted(versions._engine.held) == in_flight == [1, 2, 3]
    await made
    assert sorted(versions._engine.held) == left


async def test_memory_is_that_of_all_ranks() -> None:
    first, second = await residents([1, 2], [1, 2], ranks=3).list(checksum=False)
    assert (first.slot, first.device_bytes, first.host_bytes) == (0, 30, 90)
    assert (second.slot, second.device_bytes, second.host_bytes) == (None, 0, 90)
