"""The pace that clients must keep, with scripted connections."""

import asyncio

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.middleware import PACE_BYTES, BodyLimit, ClientPace

SCOPE: Scope = {"type": "http", "path": "/edits", "method": "POST", "headers": [], "asgi": {"spec_version": "2.4"}}
TIMEOUT_S = 0.2


class Connection:
    """Gives its messages, each so long after the one before, and then nothing more."""

    def __init__(self, *messages: Message, every_s: float = 0) -> None:
        self.messages = list(messages)
        self.every_s = every_s
        self.answer: list[Message] = []

    async def receive(self) -> Message:
        await asyncio.sleep(self.every_s)
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)

    async def send(self, message: Message) -> None:
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
    inner = BodyLimit(app, max_bytes=2**20, streamed=frozenset(), unread=frozenset()) if limited else app
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


@pytest.mark.parametrize(("part_bytes", "status"), [(PACE_BYTES, 200), (1, 408)])
async def test_a_body_may_take_long_if_it_comes_at_a_pace(part_bytes: int, status: int) -> None:
    parts = [piece(b"a" * part_bytes, more=number < 9) for number in range(10)]
    connection = Connection(*parts, every_s=TIMEOUT_S / 4)
    await serve(echo, connection, limited=True)
    assert connection.status == status


async def test_what_the_service_does_between_two_parts_is_not_the_clients_time() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        async for _ in Request(scope, receive).stream():
            await asyncio.sleep(2 * TIMEOUT_S)
        await PlainTextResponse("")(scope, receive, send)

    connection = Connection(piece(b"a", more=True), piece(b"b", more=True), piece(b"", more=False), every_s=0.001)
    await serve(slow, connection)
    assert connection.status == 200


async def test_behind_its_body_a_client_may_be_silent() -> None:
    with pytest.raises(TimeoutError):  # the application's own patience, not the middleware's
        await serve(waits_for_the_client_to_leave, Connection(piece(b"a", more=False)))


async def test_another_protocol_is_passed_on() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    connection = Connection()
    await ClientPace(app, timeout_s=TIMEOUT_S)({"type": "lifespan"}, connection.receive, connection.send)
    assert seen == ["lifespan"]
