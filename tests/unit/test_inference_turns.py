"""Whose requests are in the engine at once: never more versions than it has slots for beside the pinned ones."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import pytest
from vllm.exceptions import GenerationError
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput

from worker.inference.turns import SlotsInUseError, TooManyPinsError, Turns

SLOTS = 4


class Engine:
    """Holds what a batch may consist of against what is pinned, as vLLM would."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.pinned: set[int] = set()
        self.told: list[list[int]] = []

    def check(self) -> None:
        unpinned = self.turns._in_flight.keys() - self.pinned
        assert len(unpinned) <= SLOTS - len(self.pinned), (dict(self.turns._in_flight), self.pinned)

    async def pin(self, adapters: list[int]) -> None:
        await asyncio.sleep(0)
        self.told.append(adapters)
        self.pinned = set(adapters)
        self.check()
        await asyncio.sleep(0)


class Adapters:
    """Knows adapters by number; one that was evicted is loaded again as 10 more."""

    def __init__(self, *evicted: int) -> None:
        self.evicted = set(evicted)

    def knows(self, request: LoRARequest) -> bool:
        return request.lora_int_id not in self.evicted

    async def renewed(self, request: LoRARequest) -> LoRARequest:
        return LoRARequest(request.lora_name, request.lora_int_id + 10, "/adapter")


class Request:
    """A request that is in the engine from when it may until it is ended."""

    def __init__(self, turns: Turns, adapter: int) -> None:
        self.running = False
        self._end = asyncio.Event()
        self.task = asyncio.create_task(self._run(turns, adapter))

    async def _run(self, turns: Turns, adapter: int) -> None:
        async with turns.turn(adapter):
            self.running = True
            await self._end.wait()

    async def end(self) -> None:
        self._end.set()
        await self.task


def said(text: str, finish_reason: str | None = None) -> RequestOutput:
    completion = CompletionOutput(0, text, [], None, None, finish_reason=finish_reason)
    return RequestOutput("id", None, None, None, [completion], finish_reason is not None)


async def texts(outputs: AsyncIterator[RequestOutput]) -> list[str]:
    return [output.outputs[0].text async for output in outputs]


@pytest.fixture
def turns() -> Turns:
    return Turns(SLOTS, drain_s=0.05)


@pytest.fixture
def engine(turns: Turns) -> Engine:
    return Engine(turns)


async def started(turns: Turns, *adapters: int) -> list[Request]:
    requests = [Request(turns, adapter) for adapter in adapters]
    for _ in range(3):
        await asyncio.sleep(0)
    return requests


async def end(*requests: Request) -> None:
    for request in requests:
        await request.end()
    for _ in range(3):
        await asyncio.sleep(0)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def running(requests: list[Request]) -> list[bool]:
    return [request.running for request in requests]


async def test_without_pins_as_many_versions_run_as_there_are_slots(turns: Turns) -> None:
    requests = await started(turns, 1, 2, 3, 4, 1, 5)
    assert running(requests) == [True] * 5 + [False]
    await end(requests[1])
    assert requests[-1].running
    await end(*requests[:1], *requests[2:])
    assert not turns._in_flight


async def test_versions_that_are_not_pinned_leave_the_slots_of_pinned_ones_free(turns: Turns, engine: Engine) -> None:
    await turns.pin([1, 2], engine.pin)
    requests = await started(turns, 3, 4, 5, 1, 2)
    assert running(requests) == [True, True, False, True, True]
    await end(requests[0])
    assert requests[2].running
    await end(*requests[1:])


async def test_who_came_first_goes_first_but_a_pinned_version_never_waits(turns: Turns, engine: Engine) -> None:
    await turns.pin([1, 2, 3], engine.pin)
    requests = await started(turns, 4, 5, 4, 1)
    assert running(requests) == [True, False, False, True], "a new request of 4 would keep 5 out for ever"
    await end(requests[0])
    assert running(requests) == [True, True, False, True]
    await end(requests[1])
    await end(*requests[2:])


async def test_the_base_model_waits_for_nobody(turns: Turns, engine: Engine) -> None:
    await turns.pin([1, 2, 3], engine.pin)
    requests = await started(turns, 4)
    async with turns.turn(None):
        pass
    await end(*requests)


async def test_one_slot_stays_free(turns: Turns, engine: Engine) -> None:
    with pytest.raises(TooManyPinsError, match="4 versions cannot be pinned: one of 4 slots must be free"):
        await turns.pin([1, 2, 3, 4], engine.pin)
    assert engine.told == []


async def test_a_version_is_pinned_when_those_whose_slots_it_takes_have_ended(turns: Turns, engine: Engine) -> None:
    await turns.pin([1], engine.pin)
    requests = await started(turns, 4, 5, 6)
    pinning = asyncio.create_task(turns.pin([1, 2], engine.pin))
    late = await started(turns, 2, 4, 1)
    assert running(late) == [False, False, True], "what is under way ends first"
    assert (engine.pinned, turns.pinned) == ({1}, {1})
    await end(requests[0])
    await pinning
    assert (engine.pinned, turns.pinned) == ({1, 2}, {1, 2})
    await asyncio.sleep(0)
    assert running(late) == [True, False, True]
    await end(requests[1])
    assert late[1].running
    await end(requests[2], *late)


async def test_where_they_do_not_end_in_time_only_those_pinned_before_are(turns: Turns, engine: Engine) -> None:
    await turns.pin([1, 2], engine.pin)
    requests = await started(turns, 2, 5, 6)
    with pytest.raises(SlotsInUseError, match=r"longer than 0\.05 s"):
        await turns.pin([1, 7, 8], engine.pin)
    assert (engine.pinned, turns.pinned) == ({1}, {1})
    more = await started(turns, 5, 1)
    assert running(more) == [True, True], "nothing more is to be pinned, so they run as before"
    await end(*requests, *more)


async def test_a_version_that_the_engine_forgot_is_pinned_no_more(turns: Turns, engine: Engine) -> None:
    await turns.pin([1, 2, 3], engine.pin)
    requests = await started(turns, 4, 5)
    engine.pinned.discard(3)
    turns.forget(3)
    await asyncio.sleep(0)
    assert running(requests) == [True, True]
    assert turns.pinned == {1, 2}
    await end(*requests)


@pytest.mark.parametrize("admitted", [False, True])
async def test_who_gives_up_waiting_holds_nobody_up(turns: Turns, engine: Engine, admitted: bool) -> None:
    await turns.pin([1, 2, 3], engine.pin)
    [first, second, third] = await started(turns, 4, 5, 6)
    if admitted:
        first._end.set()
        await first.task
        assert 5 in turns._in_flight
    second.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second.task
    await end(first)
    await end(third)
    assert third.running
    assert (turns._in_flight, len(turns._waiting)) == ({}, 0)


async def test_an_engine_that_refuses_to_pin_is_believed(turns: Turns, engine: Engine) -> None:
    async def refuse(_: list[int]) -> None:
        raise LookupError

    await turns.pin([1], engine.pin)
    with pytest.raises(LookupError):
        await turns.pin([1, 2], refuse)
    requests = await started(turns, 3, 4, 5)
    assert (turns.pinned, running(requests)) == ({1}, [True] * 3)
    await end(*requests)


async def test_an_answer_is_closed_before_its_turn_ends(turns: Turns) -> None:
    seen = []

    async def generate(prompt: str, *, lora_request: LoRARequest | None) -> AsyncIterator[RequestOutput]:
        try:
            yield said(prompt)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            seen.append((lora_request and lora_request.lora_int_id, dict(turns._in_flight)))

    for request, in_flight in ((LoRARequest("errata@7", 7, "/adapter"), {7: 1}), (None, {})):
        outputs = turns.in_turn(generate, Adapters())("prompt", lora_request=request)
        assert (await anext(outputs)).outputs[0].text == "prompt"
        await outputs.aclose()
        assert seen.pop() == (request and 7, in_flight)
        assert not turns._in_flight


async def test_a_client_that_leaves_while_it_waits_ends_the_answer_and_its_turn(turns: Turns) -> None:
    aborted = []

    async def generate(*, lora_request: LoRARequest) -> AsyncIterator[RequestOutput]:
        try:
            yield said("one")
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            aborted.append(lora_request.lora_int_id)
            raise

    reading = asyncio.create_task(
        texts(turns.in_turn(generate, Adapters())(lora_request=LoRARequest("errata@7", 7, "/adapter")))
    )
    await settled()
    assert turns._in_flight == {7: 1}
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert (aborted, turns._in_flight) == ([7], {})


async def test_a_turn_ends_with_the_answer_whoever_still_reads_it(turns: Turns, engine: Engine) -> None:
    async def generate(*, lora_request: LoRARequest) -> AsyncIterator[RequestOutput]:
        for text in ("one", "two"):
            await asyncio.sleep(0)
            yield said(text)
        yield said("three", "stop")

    readers = [
        turns.in_turn(generate, Adapters())(lora_request=LoRARequest(f"errata@{number}", number, f"/{number}"))
        for number in (5, 6)
    ]
    for reader in readers:
        assert (await anext(reader)).outputs[0].text == "one"
    await settled()
    assert not turns._in_flight
    await turns.pin([1, 2, 3], engine.pin)
    for reader in readers:
        assert await texts(reader) == ["two", "three"]


@pytest.mark.parametrize("reads", [True, False])
async def test_what_the_engine_fails_with_is_behind_what_it_said(turns: Turns, reads: bool) -> None:
    async def generate(*, lora_request: LoRARequest) -> AsyncIterator[RequestOutput]:
        yield said("one")
        yield said("two")
        raise MemoryError

    outputs = turns.in_turn(generate, Adapters())(lora_request=LoRARequest("errata@7", 7, "/adapter"))
    await anext(outputs)
    await settled()
    assert not turns._in_flight
    if reads:
        assert (await anext(outputs)).outputs[0].text == "two"
        with pytest.raises(MemoryError):
            await anext(outputs)
    else:
        await outputs.aclose()


async def test_an_answer_that_a_stopping_engine_gave_up_is_not_a_whole_one(turns: Turns) -> None:
    async def generate(*, lora_request: LoRARequest | None) -> AsyncIterator[RequestOutput]:
        yield said("Par")
        yield said("is", "abort")

    for request in (LoRARequest("errata@7", 7, "/adapter"), None):
        outputs = turns.in_turn(generate, Adapters())(lora_request=request)
        assert (await anext(outputs)).outputs[0].text == "Par"
        with pytest.raises(GenerationError, match="stopped before the answer had ended"):
            await anext(outputs)
        assert not turns._in_flight


async def test_a_request_whose_adapter_was_evicted_before_its_turn_has_it_loaded_again(turns: Turns) -> None:
    adapters = Adapters()
    asked: list[int] = []

    async def generate(*, lora_request: LoRARequest) -> AsyncIterator[RequestOutput]:
        asked.append(lora_request.lora_int_id)
        assert turns.wanted(lora_request.lora_int_id)
        yield said("said", "stop")

    blocking = await started(turns, 1, 2, 3, 4)
    request = LoRARequest("errata@7", 7, "/adapter")
    answer = asyncio.create_task(texts(turns.in_turn(generate, adapters)(lora_request=request)))
    await settled()
    assert turns.wanted(7), "it waits"
    adapters.evicted = {7, 17}
    await end(blocking[0])
    assert (await answer, asked) == (["said"], [27])
    assert not turns.wanted(7)
    await end(*blocking[1:])


async def test_the_end_of_an_adapters_requests_is_waited_for(turns: Turns) -> None:
    requests = await started(turns, 1, 1, 2)
    ended = asyncio.create_task(turns.ended(1))
    for request in requests[:2]:
        await asyncio.sleep(0)
        assert not ended.done()
        await end(request)
    await asyncio.wait_for(ended, 1)
    await turns.ended(1)
    await end(requests[2])


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_comes_the_engine_has_a_slot_for_each_version_of_a_batch(seed: int) -> None:
    turns = Turns(SLOTS, drain_s=0.005)
    engine, chance = Engine(turns), random.Random(seed)
    ended = 0

    async def ask() -> None:
        nonlocal ended
        async with turns.turn(chance.choice([None, *range(1, 8)])):
            engine.check()
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(chance.choice([0, 0, 0.001]))
                engine.check()
        ended += 1

    async def pin() -> None:
        for _ in range(20):
            with contextlib.suppress(SlotsInUseError):
                await turns.pin(chance.sample(range(1, 8), chance.randrange(SLOTS)), engine.pin)
            if engine.pinned and chance.random() < 0.3:
                engine.pinned.discard(gone := chance.choice(sorted(engine.pinned)))
                turns.forget(gone)
            await asyncio.sleep(0.001)

    asking = [asyncio.create_task(ask()) for _ in range(60)]
    pinning = asyncio.create_task(pin())
    for _ in range(100):
        asking.append(asyncio.create_task(ask()))
        if chance.random() < 0.2:
            chance.choice(asking).cancel()
        await asyncio.sleep(0)
    await pinning
    cancelled = [
        isinstance(outcome, BaseException) for outcome in await asyncio.gather(*asking, return_exceptions=True)
    ]
    assert ended + sum(cancelled) == len(asking)
    assert (turns._in_flight, len(turns._waiting)) == ({}, 0)
