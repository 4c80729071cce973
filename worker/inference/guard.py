"""The node's door: every route but none of vLLM's adapter management, for holders of the internal token only."""

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from worker.inference.environment import TOKEN_VARIABLE, IncompleteEnvironmentError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# These load any path of the node's disk under any name. Versions come in through the resolver, verified, or not at all.
_CLOSED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")


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
        elif scope["path"].removeprefix(scope.get("root_path", "")).startswith(_CLOSED):
            await _refuse(scope, send, 404, "not_found", "adapters are not managed from outside")
        else:
            await self._app(scope, receive, send)


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
