"""Every route has its scope, and the OpenAPI document says so."""

import pytest
from fastapi import FastAPI

from service.api.scopes import SCOPES, scopes_for
from service.api_keys import Scope
from service.app import create_app
from service.settings import Settings


@pytest.fixture
def app() -> FastAPI:
    return create_app(Settings())


def connection(method: str, path: str) -> dict[str, object]:
    return {"type": "http", "method": method, "path": path, "root_path": "", "headers": []}


def test_every_route_has_a_scope_and_every_scope_a_route(app: FastAPI) -> None:
    routes = {(method, route.path) for route in app.routes for method in route.methods - {"HEAD"}}
    assert routes == set(SCOPES)


def test_open_are_the_health_routes_alone() -> None:
    assert {path for (_, path), scope in SCOPES.items() if scope is None} == {"/health/live", "/health/ready"}


def test_what_changes_something_is_never_read(app: FastAPI) -> None:
    reading = {method for (method, _), scope in SCOPES.items() if scope is Scope.READ}
    assert reading == {"GET"}


@pytest.mark.parametrize(
    ("method", "path", "scopes"),
    [
        ("GET", "/edits/import", {Scope.READ}),
        ("POST", "/edits/import", {Scope.EDIT}),
        ("DELETE", "/edits/batch", {Scope.EDIT}),
        ("HEAD", "/docs", {Scope.READ}),
        ("GET", "/versions/3", {Scope.READ}),
        ("POST", "/versions/3/activate", {Scope.OPERATE}),
        ("GET", "/nowhere", set(Scope)),
        ("PATCH", "/edits", set(Scope)),
        ("POST", "/edits/", set(Scope)),
        ("GET", "/health/live/", set(Scope)),
        ("GET", "/health/live", None),
    ],
)
def test_the_route_that_serves_decides(app: FastAPI, method: str, path: str, scopes: set[Scope] | None) -> None:
    assert scopes_for(app.routes, connection(method, path)) == scopes


def test_a_route_that_the_table_lacks_opens_to_nobody(app: FastAPI) -> None:
    app.get("/forgotten")(lambda: None)
    with pytest.raises(KeyError):
        scopes_for(app.routes, connection("GET", "/forgotten"))


def test_the_document_names_each_scope(app: FastAPI) -> None:
    document = app.openapi()
    assert document["components"]["securitySchemes"]["api_key"]["scheme"] == "bearer"
    assert document["paths"].keys() >= {path for _, path in SCOPES if path.startswith(("/edits", "/versions", "/v1"))}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            scope = SCOPES[method.upper(), path]
            expected = None if scope is None else [{"api_key": [scope.value]}, {}]
            assert operation.get("security") == expected, (method, path)
