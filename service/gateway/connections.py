"""The gateway's connections to a node: aiohttp's under httpx, by httpx-aiohttp.

httpx's own pool looks through all of its connections at the begin and the end of every request.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import httpx
from aiohttp import ClientError, ClientSession, DummyCookieJar, TCPConnector
from httpx_aiohttp import AiohttpTransport

# A node closes a connection that idles for 5 s; a request that meets the close would be lost.
_IDLE_S = 2.0


class Connections(AiohttpTransport):
    """As many as there are requests. Mends what aiohttp and the bridge do with an answer that is not HTTP."""

    def __init__(self) -> None:
        super().__init__(client=_session)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The answer's beginning; the rest comes as it is read.

        Raises:
            httpx.HTTPError: there is none. A node that closes the connection instead counts as not reached.
        """
        timeouts = request.extensions["timeout"]
        try:
            # aiohttp bounds the wait for an answer, but not how long a node takes to read the question.
            async with asyncio.timeout(timeouts["connect"] + timeouts["read"]):
                response = await super().handle_async_request(request)
        except TimeoutError as error:
            raise httpx.ReadTimeout("no answer begins", request=request) from error
        except (ClientError, UnicodeError) as error:
            raise httpx.RemoteProtocolError(str(error), request=request) from error
        response.stream = _InTime(cast("httpx.AsyncByteStream", response.stream), timeouts["read"])
        return response


class _InTime(httpx.AsyncByteStream):
    """A body whose pieces come in time. aiohttp waits for ever behind a chunk that has no length."""

    def __init__(self, pieces: httpx.AsyncByteStream, timeout_s: float) -> None:
        self._pieces = pieces
        self._timeout_s = timeout_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pieces = aiter(self._pieces)
        while True:
            try:
                async with asyncio.timeout(self._timeout_s):
                    piece = await anext(pieces, None)
            except TimeoutError as error:
                raise httpx.ReadTimeout(f"nothing came for {self._timeout_s} s") from error
            if piece is None:
                return
            yield piece

    async def aclose(self) -> None:
        await self._pieces.aclose()


def _session() -> ClientSession:
    return ClientSession(connector=TCPConnector(limit=0, keepalive_timeout=_IDLE_S), cookie_jar=DummyCookieJar())
