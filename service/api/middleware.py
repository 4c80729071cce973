"""ASGI middleware: a request id on every answer, its span, no body that is too slow or too large."""

import asyncio
import json
import logging
import re
import secrets
import time

from opentelemetry.trace import SpanKind, StatusCode
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ClientTooSlowError, ErrataError, TooLargeError
from service.logs import bound
from service.metrics.process import METHODS, ServiceMetrics
from service.tracing import continued, span

log = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""The status of an answer that nobody reads; nginx calls it so too."""
PACE_BYTES = 16 * 1024
"""With the default patience a modem keeps this pace."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class RequestId:
    """Puts ``x-request-id`` on every answer: the client's own, if it is a plain one, or a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with bound(request_id=request_id):
            await self._app(scope, receive, send_with_id)


class Traced:
    """Makes a span of each request, which goes on with the client's trace if it sent a ``traceparent``.

    What a scraper or a probe asks for every few seconds has none.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http" or scope["path"].startswith(("/health/", "/metrics")):
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in METHODS else "other"
        with continued(Headers(scope=scope)), span(method, kind=SpanKind.SERVER) as server:

            async def send_noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    server.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        server.set_status(StatusCode.ERROR)
                await send(message)

            server.set_attribute("http.request.method", method)
            try:
                await self._app(scope, receive, send_noted)
            finally:
                # The path itself may say anything.
                if route := getattr(scope.get("route"), "path", None):
                    server.update_name(f"{method} {route}")
                    server.set_attribute("http.route", route)
                server.set_attribute("errata.request_id", scope["state"]["request_id"])


class Measured:
    """Counts requests by route and status, and keeps when a request's last byte was read (``state.read_at``)."""

    def __init__(self, app: ASGIApp, *, metrics: ServiceMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        state = scope.setdefault("state", {})

        async def receive_timed() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                state["read_at"] = time.perf_counter()
            return message

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive_timed, send_counted)
        except ClientDisconnect:
            # Nothing is wrong with the service.
            status = CLIENT_LEFT
            log.info("request.aborted", extra={"method": scope["method"], "path": scope["path"]})
        finally:
            self._metrics.in_flight.dec()
            if passage := state.get("passage"):
                # Also an answer that nobody began to read: its client had gone.
                passage.end("aborted")
            route = getattr(scope.get("route"), "path", None)
            seconds = time.perf_counter() - began
            self._metrics.ended(method=scope["method"], route=route, status=status, seconds=seconds)


class ClientPace:
    """Gives up a client that does not send its body at a pace, so many seconds for each ``PACE_BYTES`` of it.

    One that does not take its answer is the connection's matter (`service.server`).
    """

    def __init__(self, app: ASGIApp, *, timeout_s: float) -> None:
        self._app = app
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body_is_whole = False
        answered = False
        came, left_s = 0, self._timeout_s

        async def receive_in_time() -> Message:
            nonlocal body_is_whole, came, left_s
            # Behind the body comes nothing but the client's leaving, which may take as long as it likes.
            if body_is_whole:
                return await receive()
            # Only the waiting counts: between two parts it is the service that takes its time.
            began = time.monotonic()
            try:
                async with asyncio.timeout(left_s):
                    message = await receive()
            except TimeoutError as error:
                raise ClientTooSlowError(
                    f"less than {PACE_BYTES} bytes of the body came in {self._timeout_s:g} s", param="body"
                ) from error
            left_s -= time.monotonic() - began
            came += len(message.get("body", b""))
            if came >= PACE_BYTES:
                came, left_s = 0, self._timeout_s
            body_is_whole = not message.get("more_body", False)
            return message

        async def send_noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, receive_in_time, send_noted)
        except ClientTooSlowError as error:
            if not answered:
                await refuse(send, error)


class BodyLimit:
    """Reads a body before the application does, and answers 413 once it is too large.

    Args:
        app: what is served.
        max_bytes: the largest body.
        streamed: paths whose bodies the application reads itself.
        unread: paths for which no body is read.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, streamed: frozenset[str], unread: frozenset[str]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._streamed = streamed
        self._unread = unread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http" or scope["path"] in self._streamed:
            await self._app(scope, receive, send)
            return
        body = bytearray()
        more = scope["path"] not in self._unread
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_bytes:
                await refuse(send, TooLargeError(f"the body has more than {self._max_bytes} bytes", param="body"))
                return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, replay, send)


async def refuse(send: Send, error: ErrataError) -> None:
    """Answers with an error where no handler stands, and leaves the body unread."""
    content = json.dumps(error.body()).encode()
    named = {**error.headers, "content-type": "application/json", "content-length": str(len(content))}
    headers = [(name.lower().encode(), value.encode()) for name, value in {**named, "connection": "close"}.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
