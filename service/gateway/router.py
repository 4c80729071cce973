"""The OpenAI-compatible routes: an allow-list, and nothing else reaches a node."""

import asyncio
import json
from collections.abc import Coroutine
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response

from service.api.access import Caller
from service.api.dependencies import Parts, PartsDep
from service.api.errors import RESPONSES, printable
from service.api.middleware import CLIENT_LEFT
from service.errors import BusyError, ErrataError, InvalidRequestError, MalformedRequestError, NotFoundError
from service.gateway.canary import CanaryTraffic
from service.gateway.models import Model, ModelList, resolve, served
from service.gateway.proxy import Proxy
from service.metrics.process import Passage
from service.model_names import MAX_VERSION_DIGITS, MIN_VERSION_HEADER, VERSION_HEADER

router = APIRouter(prefix="/v1", tags=["gateway"], responses=RESPONSES)

MinVersion = Annotated[
    str | None,
    Header(
        alias=MIN_VERSION_HEADER,
        pattern=f"^[0-9]{{1,{MAX_VERSION_DIGITS}}}$",
        description="Answer from this version or a later one",
    ),
]
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model"],
                    "properties": {"model": {"type": "string", "description": "`errata`, `errata@N`, `errata@0`"}},
                }
            }
        },
    },
    "responses": {
        "200": {
            "description": "OpenAI's answer, whole or as server-sent events",
            "headers": {VERSION_HEADER: {"schema": {"type": "integer"}, "description": "The version that answered"}},
            "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
        }
    },
}


@router.get("/models")
def list_models(parts: PartsDep) -> ModelList:
    """``errata`` and every verified version by name."""
    return served(parts.stores.registry)


@router.get("/models/{model}")
def get_model(model: str, parts: PartsDep) -> Model:
    """One model."""
    for found in served(parts.stores.registry).data:
        if found.id == model:
            return found
    raise NotFoundError(f"no model {model[:100]!r}", param="model", code="model_not_found")


@router.post("/completions", openapi_extra=_BODY)
async def completions(request: Request, parts: PartsDep, min_version: MinVersion = None) -> Response:
    """OpenAI's completions, answered by exactly one version."""
    return await _forward(request, parts, "/v1/completions", min_version)


@router.post("/chat/completions", openapi_extra=_BODY)
async def chat_completions(request: Request, parts: PartsDep, min_version: MinVersion = None) -> Response:
    """OpenAI's chat completions, answered by exactly one version."""
    return await _forward(request, parts, "/v1/chat/completions", min_version)


async def _forward(request: Request, parts: Parts, path: str, min_version: str | None) -> Response:
    body = _object(await request.body())
    if "model" not in body:
        raise InvalidRequestError("model: field required", param="model", code="missing_field")
    caller: Caller = request.state.caller
    traffic: CanaryTraffic = request.app.state.canary
    assignment = traffic.assign(caller.key.name if caller.key else None)
    admission = await resolve(parts.versions, body["model"], min_version, assignment)
    version = admission.version
    proxy: Proxy = request.app.state.proxy
    request.state.passage = passage = Passage(
        request.app.state.metrics, version, began=request.state.read_at, told=partial(traffic.ended, admission)
    )
    try:
        return await _while_asked(request, proxy.forward(path, body, version, passage))
    except ErrataError as error:
        refused = isinstance(error, BusyError | InvalidRequestError)
        passage.end("client_error" if isinstance(error, InvalidRequestError) else "unavailable", of_node=not refused)
        error.headers[VERSION_HEADER] = str(version)
        raise


async def _while_asked(request: Request, forwarded: Coroutine[Any, Any, Response]) -> Response:
    """The answer; status 499 if the client disconnects before it begins, which cancels the request to the node."""
    answer = asyncio.create_task(forwarded)
    left = asyncio.create_task(_client_left(request))
    try:
        await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else Response(status_code=CLIENT_LEFT)
    finally:
        answer.cancel()
        left.cancel()
        await asyncio.gather(answer, left, return_exceptions=True)


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _object(content: bytes) -> dict[str, Any]:
    try:
        body = json.loads(content)
        content.decode()
    except (ValueError, RecursionError) as error:
        raise MalformedRequestError(f"the body is not JSON: {type(error).__name__}") from error
    if not isinstance(body, dict):
        raise MalformedRequestError("the body must be a JSON object")
    for name, value in body.items():
        _check(name, value)
    return body


def _check(name: str, value: object) -> None:
    # What Python reads as JSON and no node would: a lone surrogate, NaN, Infinity.
    try:
        json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        param = printable(name)
        raise InvalidRequestError(f"{param}: is not JSON text or a JSON number", param=param) from error
