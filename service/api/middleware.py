"""ASGI middleware: a request id on every answer, and no body larger than the service reads."""

import json
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import ErrataError, TooLargeError

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

        await self._app(scope, receive, send_with_id)


class BodyLimit:
    """Reads a body before the application does, and answers 413 once it is too large."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, streamed: frozenset[str]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._streamed = streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http" or scope["path"] in self._streamed:
            await self._app(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
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
