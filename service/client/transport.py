"""What both clients say to httpx in the same way."""

import os
from typing import Any

import httpx

from service.client.calls import Call
from service.client.errors import ClientError

DEFAULT_URL = "http://127.0.0.1:8000"
# The gateway waits 60 s for a node and then says so; a client that gives up before does not learn it.
DEFAULT_TIMEOUT_S = 90.0
# httpx repeats only the making of a connection, so a request reaches the service once at most.
RETRIES = 2
_CONNECT_TIMEOUT_S = 5.0
# The service gives a sign of life on the event stream every 15 s.
_EVENTS_SILENCE_S = 60.0


def authorization(api_key: str | None) -> dict[str, str]:
    """The header with an API key, by default the environment's; none without a key.

    Raises:
        ClientError: no header can carry it; the message does not repeat it.
    """
    key = (os.environ.get("ERRATA_API_KEY", "") if api_key is None else api_key).strip()
    if not (key.isascii() and key.isprintable()):
        raise ClientError("the API key has characters that no header can carry")
    return {"Authorization": f"Bearer {key}"} if key else {}


def timeouts(timeout_s: float) -> httpx.Timeout:
    """The bounds of one call, seconds."""
    return httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))


def request_options(call: Call[Any], timeout_s: float) -> dict[str, Any]:
    """Arguments of httpx's ``request`` for a call, all but its streamed body."""
    return {
        "method": call.method,
        "url": call.path,
        "params": dict(call.params),
        "json": call.json,
        "headers": dict(call.headers),
        "timeout": timeouts(timeout_s + call.wait_s),
    }


def event_request(after: str | None) -> dict[str, Any]:
    """Arguments of httpx's ``stream`` for the event stream."""
    params = {} if after is None else {"after": after}
    return {"method": "GET", "url": "/events", "params": params, "timeout": timeouts(_EVENTS_SILENCE_S)}
