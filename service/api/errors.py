"""One error shape for everything that can go wrong in a request."""

import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from service.errors import (
    ErrataError,
    InvalidRequestError,
    MalformedRequestError,
    MethodNotAllowedError,
    NotFoundError,
    UnavailableError,
)
from service.schemas import ErrorBody

log = logging.getLogger(__name__)

RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong; `param` names the field"},
    "5XX": {"model": ErrorBody, "description": "A part of the service is not there"},
}

_CODES = {
    "extra_forbidden": "unknown_field",
    "missing": "missing_field",
    "string_unicode": "lone_surrogate",
    "json_invalid": "malformed_json",
}
_WHERE = frozenset({"body", "query", "path", "header"})


def printable(name: str) -> str:
    """A field's name as a client gave it, short and in characters that can be sent back."""
    return name[:100].encode("utf-8", "backslashreplace").decode()


def validation_error(errors: Sequence[Any], *, at: str = "") -> InvalidRequestError:
    """The first of pydantic's errors, with the field's dotted path. The input itself is never echoed."""
    first = errors[0]
    location = [printable(str(part)) for part in first["loc"]]
    param = ".".join(location[1:] if location and location[0] in _WHERE else location)
    kind = str(first["type"])
    if kind == "json_invalid":
        return MalformedRequestError(f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    return InvalidRequestError(
        f"{at}{param}: {first['msg']}" if param else "the body must be a JSON object, sent as application/json",
        param=f"{at}{param}" or None,
        code=_CODES.get(kind, "invalid_value"),
    )


def redis_unavailable(error: RedisError) -> UnavailableError:
    """What a client is told when Redis does not answer; the log has the reason."""
    log.error("redis.unavailable", extra={"reason": repr(error)})
    return UnavailableError(
        "Redis does not answer; repeat the request, with its Idempotency-Key if it has one", code="redis_unavailable"
    )


def _answer(error: ErrataError) -> JSONResponse:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def install_error_handlers(app: FastAPI) -> None:
    """Registers the handlers."""

    @app.exception_handler(ErrataError)
    async def _known(_: Request, error: ErrataError) -> JSONResponse:
        return _answer(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _answer(validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        known: dict[int, ErrataError] = {
            404: NotFoundError(f"no route {request.url.path}", code="unknown_route"),
            405: MethodNotAllowedError(f"{request.method} is not allowed on {request.url.path}"),
        }
        return _answer(known.get(error.status_code, MalformedRequestError(str(error.detail))))

    @app.exception_handler(RedisError)
    async def _redis(_: Request, error: RedisError) -> JSONResponse:
        return _answer(redis_unavailable(error))

    @app.exception_handler(Exception)
    async def _unknown(request: Request, error: Exception) -> JSONResponse:
        # This handler stands outside the middleware that puts the id on every other line and answer.
        known = {"path": request.url.path, "request_id": request.state.request_id}
        log.error("request.crashed", exc_info=error, extra=known)
        answer = _answer(ErrataError("internal error; the log has the request id"))
        answer.headers["x-request-id"] = request.state.request_id
        return answer
