"""The node's door: the few routes that Errata uses, for holders of the internal token only."""

import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from worker.inference.environment import TOKEN_VARIABLE, IncompleteEnvironmentError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# vLLM serves dozens more, and each release others: some load any path of the node's disk under any name, some replace
# the weights, stop the engine or write profiles. Versions come in through the resolver, verified, or not at all.
_OPEN = re.compile(
    r"GET /health"
    r"|POST /v1/(chat/)?completions"
    r"|GET /errata/versions(/[0-9]+/checksum)?"
    r"|POST /errata/versions/[0-9]+/prefetch"
    r"|PUT /errata/versions/pins"
    r"|DELETE /errata/versions/[0-9]+"
)


class TokenGuard:
    """ASGI middleware (vLLM's `--middleware`) that asks for `Authorization: Bearer $ERRATA_NODE_TOKEN`.

    Raises IncompleteEnvironmentError when made without a token in the environment.
    """

    def __init__(self, app: App) -> None:
        token = os.environ.get(TOKEN_VARIABLE)
        if not token:
            raise IncompleteEnvironmentError(f"{TOKEN_VARIABLE} unset: a node never serves without a token")
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401 or 404."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif not hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), self._expected):
            await _refuse(scope, send, 401, "invalid_token", "this node answers only to its internal token")
        elif _OPEN.fullmatch(f"{scope.get('method')} {scope['path'].removeprefix(scope.get('root_path', ''))}"):
            await self._app(scope, receive, send)
        else:
            await _refuse(scope, send, 404, "not_found", "this node serves only what Errata uses of it")


async def _refuse(scope: Message, send: Send, status: int, code: str, message: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": code})
        return
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    headers = [(b"content-type", b"application/json")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
