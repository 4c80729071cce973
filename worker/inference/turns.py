"""Turns: which versions' requests are in the engine at once, so that the slots of pinned versions are never needed.

The engine takes requests of as many versions into a batch as there are slots, whichever these are. Were some slots
pinned and a batch of more other versions than there are other slots, it would have nowhere to put one of them, and
stop. So requests of versions that are not pinned wait here for one another; those of pinned ones never wait.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol

import msgspec
from vllm.exceptions import GenerationError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput

_DRAIN_S = 5.0


class TooManyPinsError(Exception):
    """As many versions are to be pinned as there are slots, or more: no other one could be served."""


class SlotsInUseError(Exception):
    """Requests under way need the slots that were to be pinned."""


class Adapters(Protocol):
    """Which adapters the server knows."""

    def knows(self, request: LoRARequest) -> bool:
        """Whether the request's adapter has not been evicted."""

    async def renewed(self, request: LoRARequest) -> LoRARequest:
        """The same version loaded again."""


class Turns:
    """Adapters in flight and pinned, by vLLM's number of them. Whatever the engine has pinned is pinned here too."""

    def __init__(self, slots: int, *, drain_s: float = _DRAIN_S) -> None:
        self._slots = slots
        self._drain_s = drain_s
        self._pinned: frozenset[int] = frozenset()
        self._to_be_pinned: frozenset[int] = frozenset()
        self._in_flight: Counter[int] = Counter()
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._left = asyncio.Event()
        self._pinning = asyncio.Lock()

    @property
    def pinned(self) -> frozenset[int]:
        """The adapters that are pinned."""
        return self._pinned

    def in_turn(self, generate: Callable[..., Any], adapters: Adapters) -> Callable[..., AsyncIterator[RequestOutput]]:
        """The engine's `generate`, each call in its adapter's turn until the engine has ended the answer.

        A request whose adapter was evicted before its turn came has the version loaded again: the engine would read
        the adapter's folder in the middle of a batch, unverified, and end where the folder has gone.

        Raises GenerationError for an answer that the engine gave up.
        """

        async def answer(
            outputs: asyncio.Queue[RequestOutput | None], lora_request: LoRARequest | None, *args: Any, **options: Any
        ) -> None:
            while True:
                async with self.turn(lora_request.lora_int_id if lora_request else None):
                    if lora_request is None or adapters.knows(lora_request):
                        asked = _named_apart(lora_request) if lora_request else None
                        # Closed before the turn ends: an abort must be on its way to the engine before another
                        # version's request.
                        async with aclosing(generate(*args, lora_request=asked, **options)) as produced:
                            async for output in produced:
                                outputs.put_nowait(output)
                        return
                lora_request = await adapters.renewed(lora_request)

        async def generate_in_turn(
            *args: Any, lora_request: LoRARequest | None = None, **options: Any
        ) -> AsyncIterator[RequestOutput]:
            # Without a bound: a reader who takes nothing must not keep the turn, and an answer is no longer than the
            # model's context.
            outputs: asyncio.Queue[RequestOutput | None] = asyncio.Queue()
            answering = asyncio.create_task(answer(outputs, lora_request, *args, **options))
            answering.add_done_callback(lambda _: outputs.put_nowait(None))
            try:
                while (output := await outputs.get()) is not None:
                    _check_whole(output)
                    yield output
                await answering
            finally:
                answering.cancel()
                await asyncio.gather(answering, return_exceptions=True)

        return generate_in_turn

    @asynccontextmanager
    async def turn(self, adapter: int | None) -> AsyncIterator[None]:
        """Waits until the adapter's request may be in the engine; None, the base model, always may."""
        if adapter is None:
            yield
            return
        await self._enter(adapter)
        try:
            yield
        finally:
            self._leave(adapter)

    async def pin(self, adapters: Collection[int], tell_engine: Callable[[list[int]], Awaitable[object]]) -> None:
        """Pin these and no others.

        Raises TooManyPinsError; SlotsInUseError if requests of too many other versions do not end in time, and then
        only those of the adapters that were pinned before still are.
        """
        wanted = frozenset(adapters)
        if len(wanted) >= self._slots:
            raise TooManyPinsError(f"{len(wanted)} versions cannot be pinned: one of {self._slots} slots must be free")
        async with self._pinning:
            kept = self._pinned & wanted
            if kept != self._pinned:
                await tell_engine(sorted(kept))
                self._pinned = kept
            self._to_be_pinned = wanted
            try:
                await asyncio.wait_for(self._drained(wanted), self._drain_s)
                await tell_engine(sorted(wanted))
                self._pinned = wanted
            except TimeoutError as error:
                message = f"requests of other versions use the slots for longer than {self._drain_s:g} s"
                raise SlotsInUseError(message) from error
            finally:
                self._to_be_pinned = self._pinned
                self._admit()

    def wanted(self, adapter: int) -> bool:
        """Whether requests of the adapter are in the engine, or wait for their turn."""
        return adapter in self._in_flight or any(waiting == adapter for waiting, _ in self._waiting)

    async def ended(self, adapter: int) -> None:
        """Returns when the engine answers no request of the adapter any more."""
        while adapter in self._in_flight:
            self._left.clear()
            await self._left.wait()

    def forget(self, adapter: int) -> None:
        """The engine has forgotten the adapter, and with it that it was pinned."""
        self._pinned -= {adapter}
        self._to_be_pinned -= {adapter}
        self._admit()

    async def _enter(self, adapter: int) -> None:
        if self._fits(adapter) and (adapter in self._pinned or not self._waiting):
            self._in_flight[adapter] += 1
            return
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((adapter, admitted))
        try:
            await admitted
        except asyncio.CancelledError:
            if admitted.cancelled():
                self._waiting.remove((adapter, admitted))
                self._admit()
            else:
                self._leave(adapter)
            raise

    def _leave(self, adapter: int) -> None:
        self._in_flight[adapter] -= 1
        if not self._in_flight[adapter]:
            del self._in_flight[adapter]
        self._left.set()
        self._admit()

    def _admit(self) -> None:
        """Those who wait, in the order in which they came; only pinned ones do not wait for who came before them."""
        first_waits = False
        for adapter, admitted in list(self._waiting):
            if not (adapter in self._pinned or not first_waits) or not self._fits(adapter):
                first_waits = True
            elif not admitted.done():
                self._waiting.remove((adapter, admitted))
                self._in_flight[adapter] += 1
                admitted.set_result(None)

    def _fits(self, adapter: int) -> bool:
        """Whether the engine has slots for all in flight and this one, by what is pinned now and what is to be."""
        together = self._in_flight.keys() | {adapter}
        return all(adapter in pinned or self._room(together, pinned) for pinned in (self._pinned, self._to_be_pinned))

    def _room(self, adapters: Collection[int], pinned: frozenset[int]) -> bool:
        return len(set(adapters) - pinned) <= self._slots - len(pinned)

    async def _drained(self, pinned: frozenset[int]) -> None:
        while not self._room(self._in_flight.keys(), pinned):
            self._left.clear()
            await self._left.wait()


def _named_apart(request: LoRARequest) -> LoRARequest:
    """The request under a name that no other adapter in the engine has, which is its folder's.

    vLLM takes requests of one name for one adapter when it looks which of them a batch needs. While an evicted version
    still answers and is loaded again, one of the two would be missing and might lose its slot in the middle of a batch.
    """
    return msgspec.structs.replace(request, lora_name=request.lora_path)


def _check_whole(output: RequestOutput) -> None:
    """An engine that is told to stop ends its answers as aborted, and vLLM's server would hand them out as whole."""
    if any(completion.finish_reason == "abort" for completion in output.outputs):
        raise GenerationError("the node was stopped before the answer had ended")
