"""What the server and its engine hold between them, over stand-ins for both."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus

import pytest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.lora.request import LoRARequest

from worker.inference.residents import LoadFailedError, NotResidentError, ResidentVersions
from worker.inference.resolver import version_of
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
    asked_for: list[int] = field(default_factory=list)
    full: bool = False

    async def collective_rpc(self, method: str, args: tuple[list[int]] = ([],)) -> list[object]:
        if method == "errata_pin":
            if missing := [adapter for adapter in args[0] if adapter not in self.held]:
                return [missing] * self.ranks
            self.pinned = args[0]
            return [[]] * self.ranks
        use = {adapter: (None if at else 0, 0 if at else 10, 30) for at, adapter in enumerate(self.held)}
        return {"errata_slots": [use] * self.ranks, "errata_parameters": self.parameters}[method]

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        await asyncio.sleep(0)
        self.asked_for.append(lora_request.lora_int_id)
        if self.full:
            raise MemoryError
        if lora_request.lora_int_id not in self.held:
            self.held.append(lora_request.lora_int_id)
        assert len(self.held) <= HOST_SLOTS, "the engine must evict by itself"
        return True

    async def remove_lora(self, lora_id: int) -> None:
        self.held.remove(lora_id)


@dataclass
class Models:
    """Knows versions by name; version 7's adapter has the number 7."""

    lora_requests: dict[str, LoRARequest]
    add_lora: Callable[[LoRARequest], Awaitable[bool]] | None = None
    retired: list[int] = field(default_factory=list)

    async def resolve_lora(self, name: str) -> LoRARequest | ErrorResponse:
        if name not in self.lora_requests:
            if version_of(name) is None:
                return create_error_response("it does not exist", status_code=HTTPStatus.NOT_FOUND)
            request = LoRARequest(name, int(name.removeprefix("errata@")) + 10, "/again")
            try:
                await self.add_lora(request)
            except BaseException:  # noqa: BLE001 - as vLLM does, even of a cancellation
                return create_error_response("it could not be loaded")
            self.lora_requests[name] = request
        return self.lora_requests[name]


def residents(
    held: list[int], named: list[int], parameters: list[list[str]] | None = None, ranks: int = 1
) -> ResidentVersions:
    models = Models({f"errata@{number}": LoRARequest(f"errata@{number}", number, "/adapter") for number in named})
    versions = ResidentVersions(
        Engine(held, parameters or [], ranks=ranks),
        models,
        Turns(SLOTS),
        host_slots=HOST_SLOTS,
        retire=lambda request: models.retired.append(request.lora_int_id),
    )
    models.add_lora = versions.add_lora
    return versions


async def load(versions: ResidentVersions, number: int) -> None:
    """As the server's `resolve_lora` does."""
    request = LoRARequest(f"errata@{number}", number, "/adapter")
    await versions.add_lora(request)
    versions._models.lora_requests[request.lora_name] = request


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def known(versions: ResidentVersions) -> list[int]:
    return sorted(request.lora_int_id for request in versions._models.lora_requests.values())


@pytest.mark.parametrize(
    ("held", "left"),
    [
        pytest.param([1, 2], [1, 2, 4], id="there is room"),
        pytest.param([2, 1, 3], [1, 3, 4], id="the least recently used goes"),
    ],
)
async def test_room_is_made_in_engine_and_server_alike(held: list[int], left: list[int]) -> None:
    versions = residents(held, held)
    await load(versions, 4)
    assert sorted(versions._engine.held) == known(versions) == left


async def test_what_is_loaded_needs_no_room() -> None:
    versions = residents([2, 1, 3], [1, 2, 3])
    await versions.prefetch(1)
    assert versions._engine.held == [2, 1, 3]


async def test_a_version_that_is_evicted_while_its_prefetch_waits_is_loaded_again() -> None:
    versions = residents([2, 1, 3], [1, 2, 3])
    async with versions._turns.turn(1), versions._turns.turn(2), versions._turns.turn(3):
        loading = asyncio.create_task(load(versions, 4))
        prefetching = asyncio.create_task(versions.prefetch(1))
        await settled()
        assert versions._engine.held == [2, 1, 3], "the load waits for the requests of 2, the prefetch for the load"
        await versions.evict(1)
    await asyncio.gather(loading, prefetching)
    assert sorted(versions._engine.held) == known(versions) == [3, 4, 11]


async def test_a_load_goes_on_when_the_request_for_it_is_given_up() -> None:
    versions = residents([2, 1, 3], [1, 2, 3])
    asking = asyncio.create_task(versions.resolve_lora("errata@4"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await settled()
    assert sorted(versions._engine.held) == known(versions) == [1, 3, 14]


async def test_a_name_that_is_no_versions_is_the_servers_to_answer() -> None:
    answer = await residents([], []).resolve_lora("gpt")
    assert isinstance(answer, ErrorResponse)
    assert answer.error.code == HTTPStatus.NOT_FOUND


async def test_what_the_engine_cannot_load_is_not_the_requests_fault() -> None:
    versions = residents([], [])
    versions._engine.full = True
    with pytest.raises(LoadFailedError, match="could not be loaded"):
        await versions.resolve_lora("errata@4")


async def test_several_loads_at_once_never_have_the_engine_evict_by_itself() -> None:
    versions = residents([1, 2, 3], [1, 2, 3])
    await asyncio.gather(*(load(versions, number) for number in range(4, 9)))
    assert sorted(versions._engine.held) == known(versions) == [6, 7, 8]


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
    await load(versions, 4)
    assert versions._engine.held == [2, 3, 4]


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


async def test_what_is_pinned_is_prefetched_without_the_engine_and_what_was_is_loaded() -> None:
    versions = residents([1, 2], [1, 2])
    await versions.pin({1})
    await versions.prefetch(1)
    assert versions._engine.asked_for == []
    await versions.prefetch(2)
    await versions.evict(1)
    await versions.prefetch(1)
    assert versions._engine.asked_for[0] == 2
    assert set(versions._engine.asked_for[1:]) == {11}


async def test_an_evicted_version_is_pinned_no_more() -> None:
    versions = residents([1, 2], [1, 2])
    await versions.pin({1, 2})
    await versions.evict(1)
    await settled()
    assert versions._turns.pinned == {2}


async def test_what_is_evicted_by_name_comes_again_under_another_path_and_what_makes_room_under_its_own() -> None:
    versions = residents([1, 2, 3], [1, 2, 3])
    await versions.evict(2)
    assert versions._models.retired == [2]
    for number in (4, 5, 6):
        await load(versions, number)
    assert versions._models.retired == [2]


async def test_a_version_that_has_left_to_make_room_comes_again_under_another_path_too() -> None:
    versions = residents([2, 1, 3], [1, 2, 3])
    await load(versions, 4)
    for _ in range(2):
        with pytest.raises(NotResidentError):
            await versions.evict(2)
    assert versions._models.retired == [2]


async def test_an_evicted_version_leaves_the_engine_when_its_requests_have_ended() -> None:
    versions = residents([1, 2], [1, 2])
    request = versions._models.lora_requests["errata@1"]
    async with versions._turns.turn(1):
        await versions.evict(1)
        await settled()
        assert (versions._engine.held, known(versions), versions.knows(request)) == ([1, 2], [2], False)
        with pytest.raises(NotResidentError):
            await versions.evict(1)
    await settled()
    assert versions._engine.held == [2]


async def test_a_version_that_comes_again_while_it_leaves_is_another_adapter() -> None:
    versions = residents([1], [1])
    request = versions._models.lora_requests["errata@1"]
    async with versions._turns.turn(1):
        await versions.evict(1)
        again = await versions.renewed(request)
    await settled()
    assert (versions._engine.held, versions.knows(again), versions.knows(request)) == ([11], True, False)


@pytest.mark.parametrize(("asked", "left"), [([2], [2, 3, 4]), ([2, 1], [1, 2, 4])])
async def test_room_is_made_of_what_nobody_asks(asked: list[int], left: list[int]) -> None:
    versions = residents([2, 1, 3], [1, 2, 3])
    async with contextlib.AsyncExitStack() as turns:
        for adapter in asked:
            await turns.enter_async_context(versions._turns.turn(adapter))
        await load(versions, 4)
        assert sorted(versions._engine.held) == known(versions) == left


async def test_where_all_are_asked_the_least_recently_used_is_waited_for() -> None:
    versions = residents([2, 1, 3], [1, 2, 3])
    async with contextlib.AsyncExitStack() as turns:
        for adapter in (1, 2, 3):
            await turns.enter_async_context(versions._turns.turn(adapter))
        loading = asyncio.create_task(load(versions, 4))
        await settled()
        assert (versions._engine.held, known(versions)) == ([2, 1, 3], [1, 3])
    await loading
    assert versions._engine.held == [1, 3, 4]


async def test_memory_is_that_of_all_ranks() -> None:
    first, second = await residents([1, 2], [1, 2], ranks=3).list(checksum=False)
    assert (first.slot, first.device_bytes, first.host_bytes) == (0, 30, 90)
    assert (second.slot, second.device_bytes, second.host_bytes) == (None, 0, 90)
