"""Which requests the canary gets, and how requests ended meanwhile: counts that are sent to Redis once a second."""

import asyncio
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress

from redis.exceptions import RedisError

from service.canary import Canaries
from service.gateway.models import Admission, CanaryAssignment

log = logging.getLogger(__name__)

_SEND_EVERY_S = 1.0
_COUNTED = {"ok": "ok", "unavailable": "errors", "broken": "errors"}


class CanaryTraffic:
    """The gateway's part of a canary.

    Args:
        canaries: where outcomes are counted.
        share: of the requests to ``errata``, 0 to 1.
        keys: names of the API keys whose requests are the canary's anyway.
        draw: a number from 0 up to but not including 1.
    """

    def __init__(
        self,
        canaries: Canaries,
        *,
        share: float,
        keys: Collection[str],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._canaries = canaries
        self._share = share
        self._keys = frozenset(keys)
        self._draw = draw
        self._unsent: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._sender: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts sending counts to Redis."""
        self._sender = asyncio.create_task(self._send_regularly())

    async def stop(self) -> None:
        """Stops, once the last counts are sent."""
        if self._sender:
            self._sender.cancel()
            with suppress(asyncio.CancelledError):
                await self._sender
        await self._send()

    def assign(self, key_name: str | None) -> CanaryAssignment:
        """Whether a request of this API key is the canary's; None is a request without a key."""
        if key_name in self._keys:
            return CanaryAssignment.BY_KEY
        return CanaryAssignment.SAMPLED if self._draw() < self._share else CanaryAssignment.NONE

    def ended(self, admission: Admission, outcome: str) -> None:
        """Counts how a request ended; outcomes that are the client's own doing are not counted."""
        if admission.canary is not None and outcome in _COUNTED:
            by = "canary" if admission.version == admission.canary else "active"
            self._unsent[admission.canary][f"{by}_{_COUNTED[outcome]}"] += 1

    async def _send_regularly(self) -> None:
        while True:
            await asyncio.sleep(_SEND_EVERY_S)
            await self._send()

    async def _send(self) -> None:
        unsent, self._unsent = self._unsent, defaultdict(Counter)
        for canary, counts in unsent.items():
            try:
                await asyncio.to_thread(self._canaries.count, canary, counts)
            except RedisError as error:
                # Lost, as if the requests had not been: a canary is judged by those that are known.
                log.warning("canary.not_told", extra={"canary": canary, "reason": repr(error)})
