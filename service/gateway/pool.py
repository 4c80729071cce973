"""The nodes as the gateway sees them: which of them serve, what they hold, how busy they are."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx
from redis.exceptions import RedisError

from service.gateway.connections import Connections
from service.nodes import authorization

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_LOOK_TIMEOUT_S = 2.0


@dataclass
class PoolNode:
    """A node.

    Attributes:
        answers: it answered when it was last looked at.
        ejected: it must not serve.
        holds: its versions; empty if it is the only node.
        busy: answers that it is computing.
    """

    address: str
    client: httpx.AsyncClient
    answers: bool = False
    ejected: bool = False
    holds: frozenset[int] = frozenset()
    busy: int = 0

    @contextmanager
    def occupied(self, answers: int) -> Iterator[None]:
        """Counts so many answers as being computed, as long as the context lasts."""
        self.busy += answers
        try:
            yield
        finally:
            self.busy -= answers

    async def look(self, *, at_versions: bool) -> None:
        """Finds out whether it answers and what it holds."""
        try:
            self.answers = (await self.client.get("/health", timeout=_LOOK_TIMEOUT_S)).is_success
            if self.answers and at_versions:
                held = (await self.client.get("/errata/versions", timeout=_LOOK_TIMEOUT_S)).json()["resident"]
                self.holds = frozenset(entry["version"] for entry in held)
        except httpx.HTTPError:
            self.answers = False
        except (ValueError, KeyError, TypeError):
            # It refuses to say; a request to it will tell why.
            self.holds = frozenset()


class NodePool:
    """Watches the configured nodes.

    Args:
        addresses: their base URLs.
        token: the token that they demand.
        timeout_s: how long one may be silent in the middle of an answer.
        ejected: says by address which of them must not serve.
        transport: in place of the network.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        token: str,
        timeout_s: float,
        ejected: Callable[[], Collection[str]],
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._nodes = [
            PoolNode(
                address,
                httpx.AsyncClient(
                    base_url=address,
                    # A stream is passed on as it comes, so it must not be compressed.
                    headers={**authorization(token), "Accept-Encoding": "identity"},
                    # What a node says to one client must not go along with the requests of the others.
                    cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                    timeout=httpx.Timeout(timeout_s, connect=2.0, pool=None),
                    transport=transport or Connections(),
                ),
            )
            for address in addresses
        ]
        self._ejected = ejected
        self._turn = itertools.count()
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to watch."""
        await self._look()
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Ends the watch and closes the connections."""
        if self._watcher:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
        for node in self._nodes:
            await node.client.aclose()

    def readiness(self) -> dict[str, bool]:
        """Whether each node may be asked, by its address."""
        return {node.address: node.answers and not node.ejected for node in self._nodes}

    def busy(self) -> int:
        """Answers that are being computed."""
        return sum(node.busy for node in self._nodes)

    def candidates(self, version: int) -> list[PoolNode]:
        """Nodes to try: first those that hold the version, the least busy of them first."""
        able = [node for node in self._nodes if not node.ejected]
        serving = [node for node in able if node.answers] or able
        # The sort is stable: of equals each comes first in its turn.
        first = next(self._turn) % len(serving) if serving else 0
        return sorted(serving[first:] + serving[:first], key=lambda node: (version not in node.holds, node.busy))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await self._look()

    async def _look(self) -> None:
        try:
            ejected = await asyncio.to_thread(self._ejected)
            for node in self._nodes:
                node.ejected = node.address in ejected
        except RedisError as error:
            log.warning("gateway.left_out_unknown", extra={"reason": repr(error)})
        # What a node holds that is the only one decides nothing.
        several = len(self._nodes) > 1
        await asyncio.gather(*(node.look(at_versions=several) for node in self._nodes))
