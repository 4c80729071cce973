"""Forwards a request to a node and its answer back, streamed or whole."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from service.errors import BusyError, ErrataError, NodeTimeoutError, UnavailableError
from service.gateway.models import VERSION_HEADER
from service.nodes import authorization, version_name
from service.settings import Settings

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0


@dataclass
class _Node:
    """A node as the gateway sees it; ``busy`` counts the requests that it is answering."""

    address: str
    client: httpx.AsyncClient
    ready: bool = False
    holds: frozenset[int] = frozenset()
    busy: int = 0


class Proxy:
    """The nodes as the gateway sees them: which answer, what they hold, how busy they are."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        token: str,
        timeout_s: float,
        max_requests: int,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._nodes = [
            _Node(
                address,
                httpx.AsyncClient(
                    base_url=address,
                    # A stream is passed on as it comes, so it must not be compressed.
                    headers={**authorization(token), "Accept-Encoding": "identity"},
                    timeout=httpx.Timeout(timeout_s, connect=2.0, pool=None),
                    # A node closes a connection that idles for 5 s; a request that meets the close would be lost.
                    limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
                    transport=transport,
                ),
            )
            for address in addresses
        ]
        self._timeout_s = timeout_s
        self._max_requests = max_requests
        self._turn = itertools.count()
        self._watcher: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, settings: Settings) -> "Proxy":
        """A proxy for the configured nodes."""
        return cls(
            settings.nodes,
            token=settings.node_token.get_secret_value(),
            timeout_s=settings.node_timeout_s,
            max_requests=settings.gateway_max_requests,
        )

    async def start(self) -> None:
        """Begins to watch which nodes answer."""
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

    async def forward(self, path: str, body: Mapping[str, Any], version: int) -> Response:
        """A node's answer at a version.

        Until the first byte of an answer is there, a node that fails is passed over for the next; never after it.

        Raises:
            BusyError: as many requests are being answered as the gateway allows.
            UnavailableError: no node can be reached, or none came as far as the first byte.
            NodeTimeoutError: a node took the request and was silent for too long.
        """
        if sum(node.busy for node in self._nodes) >= self._max_requests:
            raise BusyError(f"{self._max_requests} requests are being answered; repeat this one", retry_after_s=1)
        content = {**body, "model": version_name(version)}
        trouble: ErrataError = UnavailableError("no node is ready", code="no_ready_node")
        for node in self._candidates(version):
            try:
                return await self._ask(node, path, content, version)
            except UnavailableError as error:
                log.warning("gateway.node_passed_over", extra={"node": node.address, "reason": error.message})
                trouble = error
        raise trouble

    async def _ask(self, node: _Node, path: str, content: Mapping[str, Any], version: int) -> Response:
        async with AsyncExitStack() as held:
            held.enter_context(_occupied(node))
            try:
                upstream = await node.client.send(node.client.build_request("POST", path, json=content), stream=True)
                held.push_async_callback(upstream.aclose)
                return await _relay(upstream, version, held)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                node.ready = False
                raise UnavailableError("no node is ready", code="no_ready_node") from error
            except httpx.ReadTimeout as error:
                raise NodeTimeoutError(f"the node was silent for {self._timeout_s:g} s") from error
            except httpx.HTTPError as error:
                raise UnavailableError(f"the node broke off: {error!r}", code="node_unavailable") from error

    def _candidates(self, version: int) -> list[_Node]:
        """Nodes to try: first those that hold the version, the least busy of them first."""
        ready = [node for node in self._nodes if node.ready] or self._nodes
        # The sort is stable: of equals each comes first in its turn.
        first = next(self._turn) % len(ready) if ready else 0
        return sorted(ready[first:] + ready[:first], key=lambda node: (version not in node.holds, node.busy))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await self._look()

    async def _look(self) -> None:
        # What one node alone holds decides nothing.
        await asyncio.gather(*(_look_at(node, holds=len(self._nodes) > 1) for node in self._nodes))


async def _look_at(node: _Node, *, holds: bool) -> None:
    try:
        node.ready = (await node.client.get("/health", timeout=2.0)).is_success
        if node.ready and holds:
            held = (await node.client.get("/errata/versions", timeout=2.0)).json()["resident"]
            node.holds = frozenset(entry["version"] for entry in held)
    except httpx.HTTPError:
        node.ready = False
    except (ValueError, KeyError, TypeError):
        # It refuses to say; a request to it will tell why.
        node.holds = frozenset()


@contextmanager
def _occupied(node: _Node) -> Iterator[None]:
    node.busy += 1
    try:
        yield
    finally:
        node.busy -= 1


async def _relay(upstream: httpx.Response, version: int, held: AsyncExitStack) -> Response:
    headers = {VERSION_HEADER: str(version)}
    kind = upstream.headers.get("content-type", "application/json")
    if upstream.is_success and kind.startswith("text/event-stream"):
        pieces = upstream.aiter_raw()
        # With the first piece in hand the node has begun; before, another could have taken the request.
        first = await anext(pieces, b"")
        return _Stream(_joined(first, pieces), headers=headers, media_type=kind, held=held.pop_all())
    content = await upstream.aread()
    if upstream.status_code in {401, 403}:
        # The node's guard refuses the service, not the client.
        raise UnavailableError("the node refuses ERRATA_NODE_TOKEN", code="node_refused")
    if upstream.is_success:
        return Response(content, headers=headers, media_type=kind)
    error = _error(upstream)
    if upstream.is_server_error:
        raise UnavailableError(f"the node failed: {error['message']}", code=error["code"])
    return JSONResponse({"error": error}, status_code=upstream.status_code, headers=headers)


class _Stream(StreamingResponse):
    """A stream that gives back what it holds however it ends, also if its client left before the first piece."""

    def __init__(self, pieces: AsyncIterator[bytes], *, held: AsyncExitStack, **options: Any) -> None:
        super().__init__(pieces, **options)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


async def _joined(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


def _error(upstream: httpx.Response) -> Mapping[str, str | None]:
    try:
        error = upstream.json()["error"]
        return {
            "message": str(error["message"]),
            "type": str(error.get("type") or "node_error"),
            "param": None if error.get("param") is None else str(error["param"]),
            "code": str(error.get("code") or "node_error"),
        }
    except (ValueError, KeyError, TypeError):
        return {"message": upstream.text[:500], "type": "node_error", "param": None, "code": "node_error"}
