import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from worker.inference.environment import IncompleteEnvironmentError
from worker.inference.guard import TokenGuard
from worker.inference.routes import router

TOKEN = "s3cret"
VLLMS = {("GET", "/health"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions")}
OPEN = [
    *sorted(VLLMS),
    ("GET", "/errata/versions"),
    ("GET", "/errata/versions/7/checksum"),
    ("POST", "/errata/versions/7/prefetch"),
    ("PUT", "/errata/versions/pins"),
    ("DELETE", "/errata/versions/7"),
]
ROUTING = {
    "get",
    "post",
    "put",
    "patch",
    "delete",
    "head",
    "options",
    "websocket",
    "api_route",
    "add_api_route",
    "mount",
}
WITH_TOKEN = {"Authorization": f"Bearer {TOKEN}"}


async def everything(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in"})


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> TokenGuard:
    monkeypatch.setenv("ERRATA_NODE_TOKEN", TOKEN)
    return TokenGuard(everything)


def node(guard: TokenGuard) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://node")


def routes_of_vllm() -> Iterator[tuple[str, str]]:
    """Method and path of every route that the installed vLLM declares anywhere, read and not imported."""
    [package] = find_spec("vllm").submodule_search_locations
    for file in Path(package, "entrypoints").rglob("*.py"):
        for found in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(found, ast.Call) and isinstance(found.func, ast.Attribute) and found.args):
                continue
            method, path = found.func.attr, found.args[0]
            if method in ROUTING and isinstance(path, ast.Constant) and str(path.value).startswith("/"):
                yield method, re.sub(r"\{.*?\}", "7", path.value)


def test_what_is_open_is_what_errata_uses(guard: TokenGuard) -> None:
    """Each of the node's own routes and no other of vLLM's but completions and health."""
    own = {(method, route.path) for route in router.routes for method in route.methods}
    assert {(method, path.replace("{version}", "7")) for method, path in own} | VLLMS == set(OPEN)


@pytest.mark.parametrize(("method", "path"), OPEN)
async def test_every_route_wants_the_token(guard: TokenGuard, method: str, path: str) -> None:
    async with node(guard) as client:
        assert (await client.request(method, path, headers=WITH_TOKEN)).text == "in"
        refused = await client.request(method, path)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"].keys() == {"message", "type", "param", "code"}
    assert refused.json()["error"]["code"] == "invalid_token"


@pytest.mark.parametrize(
    "value", ["", TOKEN, f"bearer {TOKEN}", f"Bearer {TOKEN}x", "Bearer", f"Basic {TOKEN}", "Bearer ü"]
)
async def test_anything_but_the_token_is_refused(guard: TokenGuard, value: str) -> None:
    async with node(guard) as client:
        response = await client.get("/health", headers=[(b"authorization", value.encode())])
    assert response.status_code == 401


async def test_no_other_route_of_vllm_is_open(guard: TokenGuard) -> None:
    routes = set(routes_of_vllm())
    assert {path for _, path in routes} >= {
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/collective_rpc",
        "/update_weights",
        "/start_profile",
        "/sleep",
        "/tokenize",
        "/v1/responses/7",
    }, "the search finds them"
    async with node(guard) as client:
        for declared, path in sorted(routes):
            for method in ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]:
                response = await client.request(method, path, headers=WITH_TOKEN)
                assert response.status_code == (200 if (method, path) in OPEN else 404), (declared, method, path)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/v1/models"),
        ("GET", "/v1/completions"),
        ("POST", "/health"),
        ("POST", "/health/"),
        ("POST", "/v1/completions/"),
        ("POST", "/v1//completions"),
        ("POST", "/v1/completions%0a"),
        ("POST", "/v1/completions/../load_lora_adapter"),
        ("POST", "/errata/versions/-1/prefetch"),
        ("POST", "/errata/versions/x/prefetch"),
        ("POST", "/errata/versions/%D9%A3/prefetch"),
        ("PUT", "/errata/versions/7"),
        ("GET", "/errata/versions/7"),
    ],
)
async def test_what_looks_like_an_open_route_is_none(guard: TokenGuard, method: str, path: str) -> None:
    async with node(guard) as client:
        response = await client.request(method, path, headers=WITH_TOKEN)
    assert response.status_code == 404
    if method != "HEAD":
        assert response.json()["error"]["code"] == "not_found"


async def test_a_prefix_before_the_routes_is_not_one_of_them(guard: TokenGuard) -> None:
    transport = httpx.ASGITransport(guard, root_path="/node")
    async with httpx.AsyncClient(transport=transport, base_url="http://node", headers=WITH_TOKEN) as client:
        assert (await client.get("/node/health")).status_code == 200
        assert (await client.post("/node/v1/load_lora_adapter")).status_code == 404


@pytest.mark.parametrize("headers", [[], [(b"authorization", f"Bearer {TOKEN}".encode())]])
async def test_a_websocket_is_closed(guard: TokenGuard, headers: list[tuple[bytes, bytes]]) -> None:
    sent: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    await guard({"type": "websocket", "path": "/v1/realtime", "headers": headers}, None, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_a_lifespan_message_is_passed_on(guard: TokenGuard) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    await TokenGuard(app)({"type": "lifespan"}, None, None)
    assert seen == ["lifespan"]


@pytest.mark.parametrize("token", [None, ""])
def test_a_guard_without_a_token_is_not_made(token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERRATA_NODE_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("ERRATA_NODE_TOKEN", token)
    with pytest.raises(IncompleteEnvironmentError, match="ERRATA_NODE_TOKEN"):
        TokenGuard(everything)
