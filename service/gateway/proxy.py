"""Forwards a request to a node and its answer back, streamed or whole."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx
from fastapi.responses import JSONResponse, Response, StreamingResponse

from service.errors import UnavailableError
from service.gateway.models import VERSION_HEADER
from service.nodes import authorization, version_name
from service.settings import Settings

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0


class Proxy:
    """The nodes as the gateway sees them. Knows which answer, and takes them in turn."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        token: str,
        timeout_s: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._clients = {
            address: httpx.AsyncClient(
                base_url=address,
                # A stream is passed on as it comes, so it must not be compressed.
                headers={**authorization(token), "Accept-Encoding": "identity"},
                # What a node says to one client must not go along with the requests of the others.
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                timeout=httpx.Timeout(timeout_s, connect=2.0, pool=None),
                # A node closes a connection that idles for 5 s; a request that meets the close would be lost.
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
                transport=transport,
            )
            for address in addresses
        }
        self._ready: list[str] = []
        self._turn = itertools.count()
        self._watcher: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, settings: Settings) -> "Proxy":
        """A proxy for the configured nodes."""
        return cls(settings.nodes, token=settings.node_token.get_secret_value(), timeout_s=settings.node_timeout_s)

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
        for client in self._clients.values():
            await client.aclose()

    async def forward(self, path: str, body: Mapping[str, Any], version: int) -> Response:
        """A node's answer at a version. A node that cannot be reached is passed over; one that has begun is not.

        Raises:
            UnavailableError: no node can be reached, or one broke off before its first byte.
        """
        content = {**body, "model": version_name(version)}
        for address in self._candidates():
            client = self._clients[address]
            try:
                upstream = await client.send(client.build_request("POST", path, json=content), stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                log.warning("gateway.node_unreachable", extra={"node": address})
                self._ready = [other for other in self._ready if other != address]
                continue
            except httpx.HTTPError as error:
                raise UnavailableError(f"the node broke off: {error!r}", code="node_unavailable") from error
            return await _relay(upstream, version)
        raise UnavailableError("no node is ready", code="no_ready_node")

    def _candidates(self) -> list[str]:
        ready = self._ready or list(self._clients)
        first = next(self._turn) % len(ready) if ready else 0
        return ready[first:] + ready[:first]

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            await self._look()

    async def _look(self) -> None:
        addresses = list(self._clients)
        answers = await asyncio.gather(*(self._answers(address) for address in addresses))
        self._ready = [address for address, ready in zip(addresses, answers, strict=True) if ready]

    async def _answers(self, address: str) -> bool:
        try:
            return (await self._clients[address].get("/health", timeout=2.0)).is_success
        except httpx.HTTPError:
            return False


async def _relay(upstream: httpx.Response, version: int) -> Response:
    headers = {VERSION_HEADER: str(version)}
    kind = upstream.headers.get("content-type", "application/json")
    if upstream.is_success and kind.startswith("text/event-stream"):
        return StreamingResponse(_chunks(upstream), headers=headers, media_type=kind)
    try:
        content = await upstream.aread()
    except httpx.HTTPError as error:
        raise UnavailableError(f"the node broke off: {error!r}", code="node_unavailable") from error
    finally:
        await upstream.aclose()
    if upstream.status_code in {401, 403}:
        # The node's guard refuses the service, not the client.
        raise UnavailableError("the node refuses ERRATA_NODE_TOKEN", code="node_refused")
    if upstream.is_success:
        return Response(content, headers=headers, media_type=kind)
    return JSONResponse({"error": _error(upstream)}, status_code=upstream.status_code, headers=headers)


async def _chunks(upstream: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in upstream.aiter_raw():
            yield chunk
    finally:
        await upstream.aclose()


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
