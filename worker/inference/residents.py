"""The versions that a node holds: load one, read one back, evict one."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM

from worker.inference.readback import SlotUse
from worker.inference.resolver import VersionRefusedError, version_name, version_of
from worker.inference.turns import Turns

T = TypeVar("T")


class NotResidentError(Exception):
    """The version is not loaded in this node."""

    def __init__(self, version: int) -> None:
        super().__init__(f"version {version} is not resident")


class LoadFailedError(Exception):
    """A verified version that the engine would not load; the message is the engine's."""


@dataclass(frozen=True)
class Resident:
    """One loaded version: in device slot `slot`, or in host memory only when that is None.

    Bytes are those of all ranks together.
    """

    version: int
    slot: int | None
    pinned: bool
    device_bytes: int
    host_bytes: int
    sha256: dict[str, str] | None
    """By parameter name, read back from the slot; None unless asked for, or without a slot."""


class ResidentVersions:
    """What the server and its engine hold between them."""

    def __init__(
        self,
        engine: AsyncLLM,
        models: OpenAIServingModels,
        turns: Turns,
        *,
        host_slots: int,
        retire: Callable[[LoRARequest], None],
    ) -> None:
        """`retire` has a version be loaded under another path the next time."""
        self._engine = engine
        self._models = models
        self._turns = turns
        self._host_slots = host_slots
        self._retire = retire
        self._add_lora = engine.add_lora
        self._resolve_lora = models.resolve_lora
        self._loading = asyncio.Lock()
        self._left: dict[str, LoRARequest] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def check_parameters(self, parameters: Collection[str]) -> None:
        """Raise LookupError unless `parameters` are exactly those that versions replace in this engine.

        vLLM says nothing about a target module that it does not have, and would answer every version's requests from
        the base there.
        """
        ranks: list[list[str]] = await self._engine.collective_rpc("errata_parameters")
        found = {name for names in ranks for name in names}
        if found != set(parameters):
            raise LookupError(
                f"vLLM cannot serve this model so: it holds versions of {sorted(found)}, not of {sorted(parameters)}"
            )

    async def list(self, *, checksum: bool) -> list[Resident]:
        """Return the loaded versions, ascending. With `checksum`, read back those that are in a slot."""
        ranks = await self._ranks()
        # Every rank holds the same versions in the same slots.
        slots = ranks[0]
        loaded = {
            version: request.lora_int_id
            for name, request in self._models.lora_requests.items()
            if (version := version_of(name)) is not None and request.lora_int_id in slots
        }
        return [
            Resident(
                version,
                slots[adapter].slot,
                adapter in self._turns.pinned,
                sum(rank[adapter].device_bytes for rank in ranks),
                sum(rank[adapter].host_bytes for rank in ranks),
                await self._read_back(adapter, activate=False) if checksum else None,
            )
            for version, adapter in sorted(loaded.items())
        ]

    async def prefetch(self, version: int) -> None:
        """Load a version into a slot, so that the next request for it waits for nothing. Idempotent.

        Raises DeltaError when the version is refused, LoadFailedError when the engine cannot load it.
        """
        while True:
            try:
                request = await self._resolved(version_name(version))
            except VersionRefusedError as refusal:
                raise refusal.reason from refusal
            if request.lora_int_id in self._turns.pinned:
                # It keeps its slot. The engine, which answers behind its step only, need not be asked.
                return
            async with self._loading:
                if self.knows(request):  # it may have been evicted meanwhile
                    # A version that the server knew may have left its slot; this brings it back or does nothing.
                    await self._add_lora(request)
                    return

    async def checksums(self, version: int) -> dict[str, str]:
        """Return the sha256 by parameter name of a version's matrices, read back from its slot.

        A version in host memory takes a slot for this. Raises NotResidentError.
        """
        request = self._models.lora_requests.get(version_name(version))
        found = await self._read_back(request.lora_int_id, activate=True) if request else None
        if found is None:
            raise NotResidentError(version)
        return found

    async def pin(self, versions: Collection[int]) -> None:
        """Have these versions, and no others, keep their slots whatever else is asked for.

        Raises NotResidentError, TooManyPinsError, or SlotsInUseError when requests under way need the slots.
        """
        requests = {version: self._models.lora_requests.get(version_name(version)) for version in versions}
        adapters = {request.lora_int_id: version for version, request in requests.items() if request}
        for version in set(versions).difference(adapters.values()):
            raise NotResidentError(version)

        async def tell_engine(wanted: list[int]) -> None:
            ranks: list[list[int]] = await self._engine.collective_rpc("errata_pin", args=(wanted,))
            for missing in ranks[0]:
                raise NotResidentError(adapters[missing])

        await self._turns.pin(adapters, tell_engine)

    async def evict(self, version: int) -> None:
        """Forget a version: at once in the server, and in the engine when its requests in flight have ended.

        Nothing that was computed with its slot is used when it comes again: the slot may have been damaged. That holds
        for a version that has left to make room, too.

        Raises NotResidentError.
        """
        left = self._left.pop(version_name(version), None)
        if left is not None:
            self._retire(left)
        request = self._models.lora_requests.get(version_name(version))
        if request is None:
            raise NotResidentError(version)
        self._retire(request)
        self._forget(request)
        self._in_background(self._remove(request.lora_int_id))

    async def resolve_lora(self, lora_name: str) -> LoRARequest | ErrorResponse:
        """Stands in for the server's, where a request names what the server does not know.

        The server would end a load with the request that asked for it, and the engine go on to hold an adapter that has
        no name. Of one that the engine cannot load it would say that the request is wrong.

        Raises VersionRefusedError, LoadFailedError.
        """
        if version_of(lora_name) is None:
            return await self._resolve_lora(lora_name)
        return await self._resolved(lora_name)

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """Stands in for the engine's `add_lora` where the server loads: one at a time, and room is made before.

        The engine would make room by itself, but the server would go on knowing the name, and the engine would read the
        version's local folder again, unverified, in the middle of a batch. A folder that has gone by then takes the
        engine down; a name that has gone is resolved and verified again.
        """
        async with self._loading:
            await self._make_room()
            return await self._add_lora(lora_request)

    async def _make_room(self) -> None:
        """Evict the least recently used version that is not pinned and, if there is such a one, that nobody asks."""
        slots = (await self._ranks())[0]
        if len(slots) < self._host_slots:
            return
        free = [adapter for adapter in slots if adapter not in self._turns.pinned]
        oldest = min(free, key=self._turns.wanted, default=None)
        if oldest is None:
            return
        for request in list(self._models.lora_requests.values()):
            if request.lora_int_id == oldest:
                self._forget(request)
                self._left[request.lora_name] = request
        await self._remove(oldest)

    def knows(self, request: LoRARequest) -> bool:
        """Whether the server still has the version loaded as this adapter."""
        known = self._models.lora_requests.get(request.lora_name)
        return known is not None and known.lora_int_id == request.lora_int_id

    async def renewed(self, request: LoRARequest) -> LoRARequest:
        """The version of an adapter that was evicted, loaded again. Raises VersionRefusedError, LoadFailedError."""
        return await self._resolved(request.lora_name)

    async def _resolved(self, name: str) -> LoRARequest:
        loading = self._in_background(self._resolve_lora(name))
        found = await asyncio.shield(loading)
        if not isinstance(found, LoRARequest):
            raise LoadFailedError(found.error.message)
        return found

    def _in_background(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        # asyncio itself would let go of it.
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _forget(self, request: LoRARequest) -> None:
        # At once, unlike the server's own route, which waits for who is loading the name.
        del self._models.lora_requests[request.lora_name]

    async def _remove(self, adapter: int) -> None:
        # Its name has gone, so nothing of it comes to the engine any more; see Turns.in_turn.
        await self._turns.ended(adapter)
        await self._engine.remove_lora(adapter)
        self._turns.forget(adapter)

    async def _ranks(self) -> Sequence[Mapping[int, SlotUse]]:
        return [
            {adapter: SlotUse(*use) for adapter, use in rank.items()}
            for rank in await self._engine.collective_rpc("errata_slots")
        ]

    async def _read_back(self, adapter: int, *, activate: bool) -> dict[str, str] | None:
        ranks: list[dict[str, str] | None] = await self._engine.collective_rpc(
            "errata_checksums", args=(adapter, activate)
        )
        # Under pipeline parallelism only the ranks with the tuned layer have something to say.
        return next((found for found in ranks if found), None)
