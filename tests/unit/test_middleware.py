"""The pace that clients must keep, with scripted connections."""

import asyncio
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.middleware import BodyLimit, ClientPace

SCOPE: Scope = {"type": "http", "path": "/edits", "method": "POST", "headers": [], "asgi": {"spec_version": "2.4"}}
TIMEOUT_S = 0.05


class Connection:
    """Gives its messages and then nothing more; takes so many of the answer's."""

    def __init__(self, *messages: Message, takes: int = 100) -> None:
        self.messages = list(messages)
        self.takes = takes
        self.answer: list[Message] = []

    async def receive(self) -> Message:
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)

    async def send(self, message: Message) -> None:
        if len(self.answer) >= self.takes:
            await asyncio.Event().wait()
        self.answer.append(message)

    @property
    def status(self) -> int:
        return int(self.answer[0]["status"])


def piece(body: bytes, *, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    # Longer than a client may be silent: it has nothing more to say.
    await asyncio.sleep(3 * TIMEOUT_S)
    await PlainTextResponse(body)(scope, receive, send)


async def waits_for_the_client_to_leave(scope: Scope, receive: Receive, send: Send) -> None:
    await Request(scope, receive).body()
    async with asyncio.timeout(4 * TIMEOUT_S):
        assert (await receive())["type"] == "http.disconnect"


async def serve(app: ASGIApp, connection: Connection, *, limited: bool = False) -> None:
    inner = BodyLimit(app, max_bytes=1000, streamed=frozenset()) if limited else app
    async with asyncio.timeout(5):
        await ClientPace(inner, timeout_s=TIMEOUT_S)(dict(SCOPE), connection.receive, connection.send)


async def test_a_client_that_keeps_pace_is_served() -> None:
    connection = Connection(piece(b"a", more=True), piece(b"b", more=False))
    await serve(echo, connection, limited=True)
    assert (connection.status, connection.answer[1]["body"]) == (200, b"ab")


async def test_a_client_that_stops_in_its_body_is_told() -> None:
    connection = Connection(piece(b"a", more=True))
    await serve(echo, connection, limited=True)
    assert connection.status == 408
    assert b'"client_too_slow"' in connection.answer[1]["body"]


async def test_behind_its_body_a_client_may_be_silent() -> None:
    with pytest.raises(TimeoutError):  # the application's own patience, not the middleware's
        await serve(waits_for_the_client_to_leave, Connection(piece(b"a", more=False)))


async def test_a_client_that_takes_no_answer_is_given_up_and_the_stream_closed() -> None:
    closed = asyncio.Event()

    async def endless() -> Any:
        try:
            while True:
                yield b"x"
        finally:
            closed.set()

    async def streams(scope: Scope, receive: Receive, send: Send) -> None:
        pieces = endless()
        try:
            await StreamingResponse(pieces)(scope, receive, send)
        finally:
            await pieces.aclose()

    connection = Connection(piece(b"", more=False), takes=3)
    await serve(streams, connection)
    assert len(connection.answer) == 3
    assert closed.is_set()


async def test_another_protocol_is_passed_on() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    connection = Connection()
    await ClientPace(app, timeout_s=TIMEOUT_S)({"type": "lifespan"}, connection.receive, connection.send)
    assert seen == ["lifespan"]
