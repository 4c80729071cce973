"""The gateway's connections to a node, over real sockets: whatever a node does, the client gets an answer of ours."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import httpx
import pytest
from fastapi.responses import Response
from starlette.types import Message

from service.errors import NodeTimeoutError, UnavailableError
from service.gateway.pool import NodePool
from service.gateway.proxy import Proxy
from service.metrics.process import Passage, ServiceMetrics

pytestmark = pytest.mark.timeout(20)

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECE = b"data: first\n\n"
CHUNK = b"d\r\n" + PIECE + b"\r\n"
ASKED = b'"errata@7"}'


def says(content: bytes, *, and_waits: bool = False) -> Talk:
    """A node that says this to every request and closes; or goes on holding the connection."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(ASKED)
        writer.write(content)
        await writer.drain()
        if and_waits:
            await reader.read()

    return talk


@asynccontextmanager
async def proxy_to(talk: Talk, *, timeout_s: float = 5) -> AsyncIterator[Proxy]:
    talks: list[asyncio.Task[None]] = []

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await talk(reader, writer)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talks.append(asyncio.create_task(closing(reader, writer)))

    async with await asyncio.start_server(begin, "127.0.0.1", 0) as server:
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        pool = NodePool([address], token="token", timeout_s=timeout_s, ejected=tuple)
        try:
            yield Proxy(pool, max_answers=1000)
        finally:
            await pool.stop()
            await asyncio.gather(*talks)


async def forward(proxy: Proxy, metrics: ServiceMetrics | None = None, *, prompt: str = "p") -> Response:
    passage = Passage(metrics or ServiceMetrics(), 7, began=time.perf_counter())
    return await proxy.forward("/v1/completions", {"prompt": prompt}, 7, passage)


async def leaves() -> Message:
    return {"type": "http.disconnect"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-",
        b"HTTP/1.1 200 \xff\r\n\r\n",
        HEAD + b"Content-Length: 100\r\n\r\n{",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        STREAM,
    ],
)
async def test_a_node_that_breaks_off_before_its_answer_is_there_is_a_503(content: bytes) -> None:
    async with proxy_to(says(content)) as proxy:
        with pytest.raises(UnavailableError):
            await forward(proxy)


@pytest.mark.parametrize("content", [b"", HEAD, HEAD + b"Content-Length: 100\r\n\r\n{", STREAM])
async def test_a_node_that_falls_silent_before_its_answer_is_there_is_a_504(content: bytes) -> None:
    async with proxy_to(says(content, and_waits=True), timeout_s=0.2) as proxy:
        with pytest.raises(NodeTimeoutError):
            await forward(proxy)


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # Python tells of it only where asked to
async def test_a_node_that_does_not_read_the_question_is_a_504() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()
        await done.wait()

    done = asyncio.Event()
    async with proxy_to(talk, timeout_s=0.3) as proxy:
        with pytest.raises(NodeTimeoutError):
            await forward(proxy, prompt="long " * 2_000_000)
        done.set()


@pytest.mark.parametrize("rest", [b"", b"5\r\nda", b"zz\r\n"])
async def test_a_stream_that_breaks_off_does_not_pass_for_a_whole_one(rest: bytes) -> None:
    metrics = ServiceMetrics()
    taken = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(ASKED)
        writer.write(STREAM + CHUNK)
        await taken.wait()
        writer.write(rest)

    sent: list[bytes] = []

    async def send(message: Message) -> None:
        if body := message.get("body"):
            sent.append(body)
            taken.set()

    async with proxy_to(talk, timeout_s=0.5) as proxy:
        response = await forward(proxy, metrics)
        with pytest.raises(httpx.HTTPError):
            await response({"type": "http", "asgi": {"spec_version": "2.4"}}, leaves, send)
    assert sent[0] == PIECE
    assert b"".join(sent[1:]) in {b"", b"da"}
    labels = {"version": "7", "outcome": "broken"}
    assert metrics.registry.get_sample_value("errata_gateway_requests_total", labels) == 1


async def test_no_cookie_of_a_nodes_answer_is_sent_with_the_next_request() -> None:
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not reader.at_eof():
            heard.append(await reader.readuntil(ASKED))
            writer.write(HEAD + b"Set-Cookie: who=first\r\nContent-Length: 2\r\n\r\n{}")

    async with proxy_to(talk) as proxy:
        for _ in range(2):
            await forward(proxy)
    assert len(heard) == 2
    assert not any(b"cookie" in request.lower() for request in heard)


async def test_no_request_waits_for_a_connection() -> None:
    """vLLM makes a batch of all that it has got; what waits in the gateway is not in it."""
    here = 0
    all_here = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal here
        await reader.readuntil(ASKED)
        here += 1
        if here == 150:
            all_here.set()
        await all_here.wait()
        writer.write(HEAD + b"Content-Length: 2\r\n\r\n{}")

    async with proxy_to(talk) as proxy:
        answers = await asyncio.gather(*(forward(proxy) for _ in range(150)))
    assert [json.loads(bytes(answer.body)) for answer in answers] == [{}] * 150


async def test_a_stream_that_nobody_reads_any_more_is_closed_towards_the_node() -> None:
    gone = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(ASKED)
        writer.write(STREAM + CHUNK)
        await reader.read()
        gone.set()

    async def send(_: Message) -> None:
        pass

    async with proxy_to(talk) as proxy:
        response = await forward(proxy)
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, leaves, send)
        await asyncio.wait_for(gone.wait(), 2)
