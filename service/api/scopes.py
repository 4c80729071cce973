"""Which scope opens which route: one table, and how it gets into the OpenAPI document."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI
from starlette.routing import BaseRoute, Match
from starlette.types import Scope as Connection

from service.api_keys import Scope

SCOPES: Mapping[tuple[str, str], Scope | None] = MappingProxyType(
    {
        ("POST", "/v1/completions"): Scope.INFER,
        ("POST", "/v1/chat/completions"): Scope.INFER,
        ("GET", "/v1/models"): Scope.INFER,
        ("GET", "/v1/models/{model}"): Scope.INFER,
        ("GET", "/edits"): Scope.READ,
        ("GET", "/edits/{edit_id}"): Scope.READ,
        ("GET", "/edits/{edit_id}/status"): Scope.READ,
        ("GET", "/versions"): Scope.READ,
        ("GET", "/versions/{number}"): Scope.READ,
        ("GET", "/versions/{number}/diff/{other}"): Scope.READ,
        ("GET", "/runs"): Scope.READ,
        ("GET", "/runs/{run_id}"): Scope.READ,
        ("GET", "/events"): Scope.READ,
        ("GET", "/openapi.json"): Scope.READ,
        ("GET", "/docs"): Scope.READ,
        ("GET", "/docs/oauth2-redirect"): Scope.READ,
        ("GET", "/redoc"): Scope.READ,
        ("POST", "/edits"): Scope.EDIT,
        ("POST", "/edits/batch"): Scope.EDIT,
        ("POST", "/edits/import"): Scope.EDIT,
        ("DELETE", "/edits/{edit_id}"): Scope.EDIT,
        ("POST", "/edits/{edit_id}/approve"): Scope.EDIT,
        ("POST", "/edits/{edit_id}/release"): Scope.EDIT,
        ("POST", "/versions/{number}/activate"): Scope.OPERATE,
        ("POST", "/rollback"): Scope.OPERATE,
        ("POST", "/runs"): Scope.OPERATE,
        ("POST", "/runs/{run_id}/cancel"): Scope.OPERATE,
        ("GET", "/audit"): Scope.OPERATE,
        ("GET", "/metrics"): Scope.READ,
        ("GET", "/health/live"): None,
        ("GET", "/health/ready"): None,
    }
)
"""Scope by method and path; None needs no key. A route that is not here is refused to callers that need a key."""

KEYLESS = frozenset(path for (_, path), scope in SCOPES.items() if scope is None)
"""Paths that need no key. No body is read for them: it would be no known caller's."""

_NAME = "api_key"
_DESCRIPTION = (
    "A key made by `errata keys create`; not asked for on a loopback address unless ERRATA_AUTH is `required`"
)


def scopes_for(routes: Iterable[BaseRoute], connection: Connection) -> frozenset[Scope] | None:
    """The scopes of which a key needs one, by the route that will serve the request; None if no key is needed.

    Where no route will, any key does: the answer is a 404 or a 405.

    Raises:
        KeyError: the table lacks the route.
    """
    for route in routes:
        if route.matches(connection)[0] is Match.FULL:
            method = "GET" if connection["method"] == "HEAD" else connection["method"]
            scope = SCOPES[method, getattr(route, "path", "")]
            return None if scope is None else frozenset({scope})
    return frozenset(Scope)


def document_scopes(app: FastAPI) -> None:
    """Makes the application's OpenAPI document say which scope opens each route."""
    undocumented = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        document = undocumented()
        schemes = {_NAME: {"type": "http", "scheme": "bearer", "description": _DESCRIPTION}}
        document["components"]["securitySchemes"] = schemes
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if scope := SCOPES[method.upper(), path]:
                    operation["security"] = [{_NAME: [scope.value]}, {}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
