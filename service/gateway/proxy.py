"""Forwards a request to a node and its answer back, streamed or whole."""

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import httpx
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from service.errors import BusyError, InvalidRequestError, NodeTimeoutError, UnavailableError
from service.gateway import bounds
from service.gateway.pool import NodePool, PoolNode
from service.metrics.process import Passage
from service.model_names import VERSION_HEADER, version_name
from service.tracing import outgoing

log = logging.getLogger(__name__)

# A request may itself be what a node fails at: it is not taken to all of them.
_MOST_FAILURES = 2

# What vLLM says within a stream that it has begun. No text can look like it: its quotation marks would be escaped.
_ERROR_PIECE = b'data: {"error"'


class _NoAnswerError(UnavailableError):
    """A node took the request and answers it not at all: it failed, or refuses the version.

    What it says is an exception's text, with paths and addresses: that is for the log, the code for the client.
    """

    def __init__(self, what: str, code: str, *, failed: bool) -> None:
        super().__init__(f"the node cannot answer: {code}", code=code)
        self.what = what
        self.failed = failed


class Proxy:
    """Has the nodes of a pool compute at most so many answers at once; a request may ask for several."""

    def __init__(self, pool: NodePool, *, max_answers: int) -> None:
        self._pool = pool
        self._max_answers = max_answers

    async def forward(self, path: str, body: Mapping[str, Any], version: int, passage: Passage) -> Response:
        """A node's answer at a version.

        Until the first byte of an answer is there, a node that fails or refuses the version is passed over for the
        next, and at most one that fails for another; never after it. A version that every node refuses, damaged
        perhaps, is the service's trouble, not the client's: the name that the client gave was good.

        Raises:
            InvalidRequestError: the request alone asks for more answers than the gateway allows, or for what would end
                a node; `n` is no integer.
            BusyError: as many answers are being computed as the gateway allows.
            UnavailableError: no node can be reached, none came as far as the first byte, or all refuse the version.
            NodeTimeoutError: a node took the request and was silent for too long.
        """
        bounds.check(body)
        answers = bounds.answers(body)
        if answers > self._max_answers:
            raise InvalidRequestError(
                f"{answers} answers are asked for, prompts times n; at once there may be {self._max_answers}",
                code="too_many_answers",
            )
        if (busy := self._pool.busy()) + answers > self._max_answers:
            raise BusyError(f"{busy} answers are being computed; repeat this request", retry_after_s=1)
        content = {**body, "model": version_name(version)}
        trouble = UnavailableError("no node is ready", code="no_ready_node")
        failures = 0
        for node in self._pool.candidates(version):
            try:
                return await self._ask(node, path, content, version, passage)
            except UnavailableError as error:
                known = error if isinstance(error, _NoAnswerError) else None
                reason = known.what if known else error.message
                log.warning("gateway.node_passed_over", extra={"node": node.address, "reason": reason})
                trouble = error
                failures += known is not None and known.failed
                if failures == _MOST_FAILURES:
                    break
        raise trouble

    async def _ask(
        self, node: PoolNode, path: str, content: Mapping[str, Any], version: int, passage: Passage
    ) -> Response:
        async with AsyncExitStack() as held:
            held.enter_context(node.occupied(bounds.answers(content)))
            try:
                request = node.client.build_request("POST", path, json=content, headers=outgoing())
                with passage.waiting():
                    upstream = await node.client.send(request, stream=True)
                held.push_async_callback(upstream.aclose)
                return await _relay(upstream, version, held, passage)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                node.answers = False
                raise UnavailableError("no node is ready", code="no_ready_node") from error
            except httpx.ReadTimeout as error:
                raise NodeTimeoutError("the node was silent for longer than ERRATA_NODE_TIMEOUT_S") from error
            except httpx.HTTPError as error:
                raise _NoAnswerError(f"it broke off: {error!r}", "node_unavailable", failed=True) from error


async def _relay(upstream: httpx.Response, version: int, held: AsyncExitStack, passage: Passage) -> Response:
    headers = {VERSION_HEADER: str(version)}
    kind = upstream.headers.get("content-type", "application/json")
    if upstream.is_success and kind.startswith("text/event-stream"):
        pieces = upstream.aiter_raw()
        # With the first piece in hand the node has begun; before, another could have taken the request.
        with passage.waiting():
            first = await anext(pieces, b"")
        if failure := _failure(first):
            raise _NoAnswerError(failure, "node_error", failed=True)
        passage.first_byte(streamed=True)
        return _Stream(_joined(first, pieces, passage), headers=headers, media_type=kind, held=held.pop_all())
    with passage.waiting():
        content = await upstream.aread()
    if upstream.status_code in {401, 403}:
        # The node's guard refuses the service, not the client.
        raise UnavailableError("the node refuses ERRATA_NODE_TOKEN", code="node_refused")
    if upstream.is_success:
        passage.first_byte(streamed=False)
        passage.end("ok")
        return Response(content, headers=headers, media_type=kind)
    error = _error(upstream)
    # The route is there and changes nothing: what a node does not find or refuses is the version.
    if upstream.is_server_error or upstream.status_code in {404, 409}:
        # vLLM's own code is the status once more.
        code = "node_error" if error["code"] == str(upstream.status_code) else str(error["code"])
        raise _NoAnswerError(str(error["message"]), code, failed=upstream.is_server_error)
    passage.end("client_error")
    return JSONResponse({"error": error}, status_code=upstream.status_code, headers=headers)


class _Stream(StreamingResponse):
    """A streamed answer that closes the node's response however it ends, also if the client leaves before it begins."""

    def __init__(self, pieces: AsyncIterator[bytes], *, held: AsyncExitStack, **options: Any) -> None:
        super().__init__(pieces, **options)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await super().__call__(scope, receive, send)


async def _joined(first: bytes, rest: AsyncIterator[bytes], passage: Passage) -> AsyncIterator[bytes]:
    yield first
    failed = False
    try:
        async for piece in rest:
            failed = failed or _ERROR_PIECE in piece
            yield piece
    except httpx.HTTPError:
        passage.end("broken")
        raise
    passage.end("broken" if failed else "ok")


def _failure(piece: bytes) -> str | None:
    """The message of a node's own error (code 500 or more) in a stream's first piece; None if it begins otherwise."""
    if not piece.startswith(_ERROR_PIECE):
        return None
    try:
        error = json.loads(piece.partition(b"\n")[0].removeprefix(b"data: "))["error"]
        return str(error["message"]) if int(error["code"]) >= 500 else None
    except (ValueError, KeyError, TypeError):
        return piece[:500].decode(errors="replace")


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
