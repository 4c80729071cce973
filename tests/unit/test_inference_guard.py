import httpx
import pytest
from starlette.types import Receive, Scope, Send

from worker.inference.environment import IncompleteEnvironmentError
from worker.inference.guard import TokenGuard

TOKEN = "s3cret"
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


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/errata/versions", "/no/such/route"])
async def test_every_route_wants_the_token(guard: TokenGuard, path: str) -> None:
    async with node(guard) as client:
        assert (await client.get(path, headers=WITH_TOKEN)).text == "in"
        refused = await client.get(path)
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


@pytest.mark.parametrize(
    "path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/errata@1"]
)
async def test_adapters_are_not_managed_from_outside(guard: TokenGuard, path: str) -> None:
    async with node(guard) as client:
        response = await client.post(path, headers=WITH_TOKEN)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


async def test_a_websocket_without_the_token_is_closed(guard: TokenGuard) -> None:
    sent: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    await guard({"type": "websocket", "path": "/v1/realtime", "headers": []}, None, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_start_up_passes(guard: TokenGuard) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    await TokenGuard(app)({"type": "lifespan"}, None, None)
    assert seen == ["lifespan"]


@pytest.mark.parametrize("token", [None, ""])
def test_no_token_no_node(token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERRATA_NODE_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("ERRATA_NODE_TOKEN", token)
    with pytest.raises(IncompleteEnvironmentError, match="ERRATA_NODE_TOKEN"):
        TokenGuard(everything)
