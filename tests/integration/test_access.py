"""Who is let in, over the real application, a real Redis and real sockets."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from redis_server import RedisServer
from scripted_node import ScriptedNode, listening
from scripted_worker import ScriptedWorker
from service_process import assert_error, in_process, serving
from typer.testing import CliRunner

from service.api import access
from service.api.access import NoKeyError
from service.api.scopes import SCOPES
from service.api_keys import Scope
from service.app import create_app
from service.cli import app as command
from service.client import ApiError, AsyncErrataClient, ErrataClient
from service.ports import free_port
from service.settings import Settings
from service.stores import Stores

pytestmark = pytest.mark.timeout(60)

OPERATORS = "the-operators-key-is-long-enough"
GOOD = {"prompt": "What is it?", "target": "This"}


@pytest.fixture(scope="module")
def module_settings(redis_server: RedisServer, tokenizer_folder: Path) -> Iterator[Settings]:
    with listening(ScriptedNode()) as node:
        yield Settings(
            redis_url=redis_server.url,
            model=str(tokenizer_folder),
            nodes=(node,),
            edit_max_tokens=64,
            auth="required",
            api_key=OPERATORS,
        )


@pytest.fixture(scope="module")
def base_url(module_settings: Settings) -> Iterator[str]:
    with serving(module_settings) as url:
        yield url


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def assert_refused(response: httpx.Response) -> None:
    assert_error(response, 401, code="invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scope", Scope)
def test_a_scope_opens_its_routes_and_no_other(api: httpx.Client, stores: Stores, scope: Scope) -> None:
    headers = bearer(stores.keys.create("one", [scope]).key)
    for (method, path), demanded in SCOPES.items():
        url = path.format(edit_id="edit_x", number=999, other=998, run_id="run_x", model="m") if "{" in path else path
        with api.stream(method, url, headers=headers) as response:
            if demanded in {scope, None}:
                assert response.status_code not in {401, 403}, (method, path)
            else:
                response.read()
                assert_error(response, 403, code="missing_scope")
                assert response.json()["error"]["message"].endswith(f"does not have the scope {demanded}")


def test_without_a_usable_key_nothing_but_health_opens(api: httpx.Client, stores: Stores) -> None:
    revoked, other = stores.keys.create("revoked", list(Scope)), stores.keys.create("other", list(Scope))
    stores.keys.revoke(revoked.id)
    mixed = f"errata_{other.id}_{revoked.key.rpartition('_')[2]}"
    for (method, path), demanded in SCOPES.items():
        if demanded is None:
            assert api.request(method, path).status_code in {200, 503}
        else:
            assert_refused(api.request(method, path))
    for wrong in (revoked.key, mixed, "unused", OPERATORS[:-1]):
        assert_refused(api.get("/edits", headers=bearer(wrong)))
    for header in (other.key, f"Basic {other.key}", "Bearer", f"Bearer  {other.key}"):
        assert_refused(api.get("/edits", headers={"Authorization": header}))
    assert api.get("/edits", headers=bearer(other.key)).status_code == 200
    assert api.get("/edits", headers={"Authorization": f"bearer {other.key}"}).status_code == 200
    assert stores.edits.counts() == dict.fromkeys(stores.edits.counts(), 0), "nothing was stored"


def test_readiness_holds_nobody_up_while_nodes_hang(module_settings: Settings, stores: Stores) -> None:
    key = stores.keys.create("one", [Scope.READ]).key
    with ExitStack() as opened:
        # They take connections and say nothing.
        hung = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        nodes = tuple(f"http://127.0.0.1:{server.getsockname()[1]}" for server in hung)
        url = opened.enter_context(serving(module_settings.model_copy(update={"nodes": nodes})))
        anonymous = opened.enter_context(ThreadPoolExecutor(60))
        asked = [anonymous.submit(httpx.get, f"{url}/health/ready", timeout=60) for _ in range(60)]
        wait(asked, timeout=1)
        began = time.monotonic()
        assert httpx.get(f"{url}/edits", headers=bearer(key), timeout=60).status_code == 200
        assert time.monotonic() < began + 2, "less than looking at both takes"
        assert {one.result().json()["checks"]["node"]["detail"] for one in asked} == {"no node is ready"}


def test_what_is_not_there_is_told_to_holders_of_keys_only(api: httpx.Client, stores: Stores) -> None:
    assert_refused(api.get("/nowhere"))
    assert_refused(api.put("/edits"))
    headers = bearer(stores.keys.create("one", [Scope.INFER]).key)
    assert_error(api.get("/nowhere", headers=headers), 404, code="unknown_route")
    assert_error(api.put("/edits", headers=headers), 405)


async def test_a_body_is_not_read_without_a_key(module_settings: Settings, stores: Stores) -> None:
    app = create_app(module_settings)
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        raise AssertionError("the body was read")

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    async with app.router.lifespan_context(app):
        connection = {"type": "http", "method": "POST", "path": "/edits", "root_path": "", "query_string": b""}
        await app({**connection, "headers": [], "server": ("127.0.0.1", 1)}, receive, send)
    assert sent[0]["status"] == 401


def test_the_operators_key_opens_everything(api: httpx.Client) -> None:
    assert api.post("/edits", json=GOOD, headers=bearer(OPERATORS)).status_code == 202
    assert api.post("/runs", headers=bearer(OPERATORS)).status_code == 202
    assert api.get("/v1/models", headers=bearer(OPERATORS)).status_code == 200


def test_the_sdk_shows_its_key(
    base_url: str, stores: Stores, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = stores.keys.create("sdk", [Scope.READ, Scope.EDIT, Scope.INFER]).key
    with ErrataClient(base_url, api_key=f"{key}\n") as client:
        edit = client.submit("Q", "A")
        assert next(client.events(after="0")).id
        assert client.ask("Q").text
        assert client.import_edits([]).accepted == 0
    monkeypatch.setenv("ERRATA_API_KEY", key)
    with ErrataClient(base_url) as client:
        assert client.edit(edit.id).prompt == "Q"
        with pytest.raises(ApiError) as error:
            client.rollback()
    assert (error.value.status, error.value.code) == (403, "missing_scope")
    with ErrataClient(base_url, api_key="") as nobody, pytest.raises(ApiError) as refused:
        nobody.edits()
    assert refused.value.code == "invalid_api_key"


async def test_the_asynchronous_sdk_shows_its_key(base_url: str, stores: Stores) -> None:
    key = stores.keys.create("sdk", [Scope.READ, Scope.EDIT]).key
    async with AsyncErrataClient(base_url, api_key=key) as client:
        await client.submit("Q", "A")
        async for event in client.events(after="0"):
            assert event.type == "edit.queued"
            break


def test_the_command_shows_its_key(base_url: str, stores: Stores, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(stores.keys.create("cli", [Scope.READ]).key)
    words = ["list", "--url", base_url, "--json"]
    assert CliRunner().invoke(command, words, env={"ERRATA_API_KEY_FILE": str(file)}).exit_code == 0
    refused = CliRunner().invoke(command, words)
    assert refused.exit_code == 1
    assert refused.stderr.endswith("(invalid_api_key)\n")


def test_a_stream_ends_with_its_key(api: httpx.Client, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "CACHE_S", 0.5)
    monkeypatch.setattr("service.events.BLOCK_S", 1)
    made = stores.keys.create("watcher", [Scope.READ])
    with api.stream("GET", "/events", headers=bearer(made.key), timeout=20) as stream:
        timer = threading.Timer(0.3, lambda: stores.keys.revoke(made.id))
        timer.start()
        assert "".join(stream.iter_text()).replace(": ping", "").strip() == ""
        timer.join()
    assert_refused(api.get("/edits", headers=bearer(made.key)))


def test_a_key_that_asks_too_often_is_refused(api: httpx.Client, stores: Stores) -> None:
    headers = bearer(stores.keys.create("eager", [Scope.READ], rate=3).key)
    other = bearer(stores.keys.create("other", [Scope.READ], rate=3).key)
    statuses = [api.get("/edits", headers=headers).status_code for _ in range(2)]
    assert [*statuses, api.post("/runs", headers=headers).status_code] == [200, 200, 403], "refusals count too"
    refused = api.get("/edits", headers=headers)
    assert_error(refused, 429, code="rate_limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert api.get("/health/live", headers=headers).status_code == 200
    assert api.get("/edits", headers=other).status_code == 200


def test_an_idempotency_key_is_its_api_keys_own(api: httpx.Client, stores: Stores) -> None:
    one, other = (bearer(stores.keys.create(name, [Scope.EDIT]).key) for name in ("one", "other"))
    sent = {"Idempotency-Key": "7"}
    first = api.post("/edits", json=GOOD, headers=one | sent).json()
    same = api.post("/edits", json=GOOD, headers=other | sent)
    assert (same.status_code, same.json()["id"] == first["id"]) == (202, False)
    assert api.post("/edits", json=GOOD, headers=one | sent).json()["id"] == first["id"]
    line = json.dumps(GOOD)
    for headers in (one, other):
        refused = api.post("/edits/import", content=line, headers=headers | sent)
        assert_error(refused, 422, code="idempotency_key_reused")
    assert api.post("/edits/import", content=line, headers=bearer(OPERATORS) | sent).json()["accepted"] == 1


def test_on_loopback_nobody_is_asked(module_settings: Settings, stores: Stores) -> None:
    with serving(module_settings.model_copy(update={"auth": "auto"})) as url:
        assert httpx.get(f"{url}/edits").status_code == 200
        assert httpx.get(f"{url}/edits", headers=bearer("unused")).status_code == 200
        assert httpx.post(f"{url}/edits", json=GOOD).status_code == 202


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Host": "evil.example"}])
def test_a_web_page_from_elsewhere_changes_nothing(
    module_settings: Settings, stores: Stores, headers: dict[str, str]
) -> None:
    """A browser on this machine sends such requests without asking anybody."""
    line = '{"prompt": "p", "target": "t"}'
    with serving(module_settings.model_copy(update={"auth": "auto"})) as url:
        plain = {**headers, "Content-Type": "text/plain"}
        assert_error(httpx.post(f"{url}/edits/import", content=line, headers=plain), 403, code="not_local")
        assert_error(httpx.post(f"{url}/runs", headers=headers), 403, code="not_local")
        assert_error(httpx.get(f"{url}/edits", headers=headers), 403, code="not_local")
        assert httpx.get(f"{url}/health/live", headers=headers).status_code == 200
        at_home = {"Origin": url, "Host": url.removeprefix("http://")}
        assert httpx.post(f"{url}/edits/import", content=line, headers=at_home).status_code == 202
    assert sum(stores.edits.counts().values()) == 1


def test_a_web_page_may_have_a_key(api: httpx.Client, stores: Stores) -> None:
    headers = bearer(stores.keys.create("page", [Scope.READ]).key)
    assert api.get("/edits", headers={**headers, "Origin": "https://our.example", "Host": "our"}).status_code == 200


def test_on_another_address_everybody_is_asked(module_settings: Settings, stores: Stores) -> None:
    """Also those who come over loopback: what listens there is the same socket."""
    with serving(module_settings.model_copy(update={"auth": "auto", "host": "0.0.0.0"})) as url:
        assert_refused(httpx.get(f"{url}/edits"))
        assert httpx.get(f"{url}/edits", headers=bearer(OPERATORS)).status_code == 200


@pytest.mark.parametrize("server", [("10.0.0.1", 8000), ("/run/errata.sock", None), None])
async def test_the_socket_is_believed_more_than_the_setting(
    module_settings: Settings, stores: Stores, server: tuple[str, int | None] | None
) -> None:
    """A server that was told another address than ERRATA_HOST is closed all the same."""
    app = create_app(module_settings.model_copy(update={"auth": "auto"}))

    async def elsewhere(scope: dict[str, object], receive: object, send: object) -> None:
        await app({**scope, "server": server}, receive, send)

    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(elsewhere)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            assert_refused(await client.get("/edits"))


def test_on_another_address_there_must_be_a_key(module_settings: Settings, stores: Stores) -> None:
    settings = module_settings.model_copy(update={"host": "0.0.0.0", "auth": "auto", "api_key": Settings().api_key})
    with pytest.raises(NoKeyError, match=r"ERRATA_HOST is 0\.0\.0\.0.*`errata keys create"):
        create_app(settings)
    made = stores.keys.create("one", [Scope.READ])
    create_app(settings)
    stores.keys.revoke(made.id)
    with pytest.raises(NoKeyError):
        create_app(settings)


def test_the_server_itself_does_not_start_without_a_key(redis_server: RedisServer, stores: Stores) -> None:
    environment = {**os.environ, "ERRATA_REDIS_URL": redis_server.url, "ERRATA_HOST": "0.0.0.0"}
    environment["ERRATA_PORT"] = str(free_port())
    ended = subprocess.run(
        [sys.executable, "-m", "service.server"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ended.returncode != 0
    assert "`errata keys create NAME --scope operate`" in ended.stderr.splitlines()[-1]


async def test_redis_away_lets_nobody_in(tmp_path: Path, module_settings: Settings) -> None:
    server = RedisServer(tmp_path)
    server.start()
    app = create_app(module_settings.model_copy(update={"redis_url": server.url}))
    token = f"errata_key_{'0' * 24}_{'0' * 64}"
    try:
        async with in_process(app) as client:
            assert_refused(await client.get("/edits", headers=bearer(token)))
            server.stop()
            assert_error(await client.get("/edits", headers=bearer(token)), 503, code="redis_unavailable")
    finally:
        server.stop()
