"""Which requests the canary gets, and how those ended that it is judged by: told to Redis once a second."""

import asyncio
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress

from redis.exceptions import RedisError

from service.canary import Canaries
from service.gateway.models import Admission, Lot

log = logging.getLogger(__name__)

_TELL_EVERY_S = 1.0
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
        self._untold: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self._teller: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to tell."""
        self._teller = asyncio.create_task(self._tell_regularly())

    async def stop(self) -> None:
        """Tells what is left."""
        if self._teller:
            self._teller.cancel()
            with suppress(asyncio.CancelledError):
                await self._teller
        await self._tell()

    def lot(self, key_name: str | None) -> Lot:
        """What a request of this API key drew; None is a request without a key."""
        if key_name in self._keys:
            return Lot.NAMED
        return Lot.DRAWN if self._draw() < self._share else Lot.BLANK

    def ended(self, admission: Admission, outcome: str) -> None:
        """A request has ended; only what the node had its part in is told."""
        if admission.canary is not None and outcome in _COUNTED:
            by = "canary" if admission.version == admission.canary else "active"
            self._untold[admission.canary][f"{by}_{_COUNTED[outcome]}"] += 1

    async def _tell_regularly(self) -> None:
        while True:
            await asyncio.sleep(_TELL_EVERY_S)
            await self._tell()

    async def _tell(self) -> None:
        untold, self._untold = self._untold, defaultdict(Counter)
        for canary, counts in untold.items():
            try:
                await asyncio.to_thread(self._canaries.count, canary, counts)
            except RedisError as error:
                # Lost, as if the requests had not been: a canary is judged by those that are known.
                log.warning("canary.not_told", extra={"canary": canary, "reason": repr(error)})
