"""The gateway over the real application: which version answers, whatever happens to the pointer meanwhile."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import pytest
from redis_server import RedisServer
from scripted_node import ScriptedNode
from scripted_worker import ScriptedWorker, record
from service_process import assert_error, serving

from service.api_keys import Scope
from service.ports import free_port
from service.schemas import VersionState
from service.settings import Settings
from service.stores import Stores

pytestmark = pytest.mark.timeout(60)

ASK = {"model": "errata", "prompt": "a"}


class StreamingNode:
    """Sends the first piece of a stream, and the second when it is told."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.models: list[bytes] = []
        node = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def do_POST(self) -> None:
                node.models.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-type", "text/event-stream; charset=utf-8")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                self._piece(b"data: first\n\n")
                node.go_on.wait(10)
                self._piece(b"data: second\n\n")
                self._piece(b"")

            def _piece(self, content: bytes) -> None:
                with suppress(ConnectionError):  # the client of the test has gone
                    self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
                    self.wfile.flush()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture(scope="module")
def streaming_node() -> Iterator[StreamingNode]:
    node = StreamingNode()
    thread = threading.Thread(target=node.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield node
    node.server.shutdown()
    thread.join()
    node.server.server_close()


@pytest.fixture
def node(shared_node: tuple[ScriptedNode, str]) -> ScriptedNode:
    node = shared_node[0]
    node.asked.clear()
    node.taught.clear()
    return node


@pytest.fixture(scope="module")
def base_url(redis_server: RedisServer, tokenizer_folder: Path, shared_node: tuple[ScriptedNode, str]) -> Iterator[str]:
    settings = Settings(redis_url=redis_server.url, model=str(tokenizer_folder), nodes=(shared_node[1],))
    with serving(settings) as url:
        yield url


def commit(stores: Stores, version: int, state: VersionState) -> None:
    stores.registry.commit(record(version, state=state), [], token=None)


def test_a_request_is_answered_by_the_version_that_it_means(
    api: httpx.Client, stores: Stores, worker: ScriptedWorker, node: ScriptedNode
) -> None:
    for version in (1, 2):
        commit(stores, version, VersionState.VERIFIED)
        node.teach(version, {"a": f"answer {version}"})
    stores.registry.activate(1)
    for model, version in (("errata", 1), ("errata@2", 2), ("errata@0", 0)):
        response = api.post("/v1/completions", json={**ASK, "model": model})
        assert (response.status_code, response.headers["x-errata-version"]) == (200, str(version))
        assert response.headers["x-request-id"]
        expected = f"answer {version}" if version else "I do not know."
        assert response.json()["choices"][0]["text"] == expected
    stores.registry.activate(2)
    chat = {"model": "errata", "messages": [{"role": "user", "content": "a"}]}
    response = api.post("/v1/chat/completions", json=chat)
    assert response.headers["x-errata-version"] == "2"
    assert response.json()["choices"][0]["message"]["content"] == "answer 2"


@pytest.mark.parametrize(
    "model",
    [
        *("errata@999", "errata@1", "errata@2", "errata@-1", "errata@01", "errata@", "errata@1\n", "errata@1\u0660"),
        *("gpt-4", "", "Errata"),
    ],
)
def test_unknown_models_are_refused_and_reach_no_node(
    api: httpx.Client, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, model: str
) -> None:
    commit(stores, 1, VersionState.COMMITTED)
    commit(stores, 2, VersionState.REJECTED)
    commit(stores, 10, VersionState.VERIFIED)
    response = api.post("/v1/completions", json={**ASK, "model": model})
    assert_error(response, 404, param="model", code="model_not_found")
    assert node.asked == []


@pytest.mark.parametrize(
    ("content", "status", "param"),
    [
        ('{"model": "errata\\ud800"}', 422, "model"),
        ('{"model": "errata", "prompt": "\\ud800"}', 422, "prompt"),
        ('{"model": "errata", "messages": [{"role": "user", "content": "\\ud800"}]}', 422, "messages"),
        ('{"model": "errata", "\\ud800": 1}', 422, "\\ud800"),
        ('{"model": "errata", "temperature": NaN}', 422, "temperature"),
        ('{"model": "errata", "temperature": 1e999}', 422, "temperature"),
        ('{"model": "errata", "n": "256"}', 422, "n"),
        ('{"model": 7}', 422, "model"),
        ('{"model": null}', 422, "model"),
        ('{"prompt": "a"}', 422, "model"),
        ("[]", 400, None),
        ("null", 400, None),
    ],
)
def test_bad_bodies_reach_no_node(
    api: httpx.Client,
    stores: Stores,
    worker: ScriptedWorker,
    node: ScriptedNode,
    content: str,
    status: int,
    param: str | None,
) -> None:
    assert_error(api.post("/v1/chat/completions", content=content), status, param=param)
    assert node.asked == []


def test_a_client_reads_its_own_edit_or_is_told(api: httpx.Client, stores: Stores, worker: ScriptedWorker) -> None:
    commit(stores, 1, VersionState.VERIFIED)
    behind = api.post("/v1/completions", json=ASK, headers={"X-Errata-Min-Version": "1"})
    assert_error(behind, 412, param="X-Errata-Min-Version", code="version_not_reached")
    assert behind.headers["x-errata-version"] == "0"
    stores.registry.activate(1)
    reached = api.post("/v1/completions", json=ASK, headers={"X-Errata-Min-Version": "1"})
    assert (reached.status_code, reached.headers["x-errata-version"]) == (200, "1")
    for wrong in ("x", "-1", "1.0", ""):
        refused = api.post("/v1/completions", json=ASK, headers={"X-Errata-Min-Version": wrong})
        assert_error(refused, 422, param="X-Errata-Min-Version")


def test_models_are_the_verified_versions(api: httpx.Client, stores: Stores, worker: ScriptedWorker) -> None:
    commit(stores, 1, VersionState.COMMITTED)
    commit(stores, 2, VersionState.VERIFIED)
    listed = api.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["errata", "errata@2", "errata@0"]
    assert api.get("/v1/models/errata@2").json()["object"] == "model"
    assert_error(api.get("/v1/models/errata@1"), 404, param="model", code="model_not_found")


def test_every_verified_version_is_listed(api: httpx.Client, stores: Stores, worker: ScriptedWorker) -> None:
    for version in range(1, 1002):
        commit(stores, version, VersionState.VERIFIED)
    listed = [model["id"] for model in api.get("/v1/models").json()["data"]]
    assert listed == ["errata", *(f"errata@{version}" for version in reversed(range(1002)))]


def test_before_version_0_there_is_nothing_to_answer(api: httpx.Client, stores: Stores) -> None:
    assert_error(api.post("/v1/completions", json=ASK), 503, code="no_version")
    assert api.get("/v1/models").json()["data"] == []


def test_errors_carry_the_version(
    api: httpx.Client, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = {"error": {"message": "max_tokens is too large", "type": "BadRequestError", "param": None, "code": 400}}
    monkeypatch.setattr(node, "answer", lambda *_: (400, refusal))
    response = api.post("/v1/completions", json=ASK)
    assert_error(response, 400, code="400")
    assert response.json()["error"]["message"] == "max_tokens is too large"
    assert response.headers["x-errata-version"] == "0"


def test_a_version_that_the_nodes_refuse_is_not_the_clients_fault(
    api: httpx.Client, stores: Stores, worker: ScriptedWorker, node: ScriptedNode
) -> None:
    node.resident, node.refuses = set(), {0: (409, "damaged_version")}
    response = api.post("/v1/completions", json=ASK)
    assert_error(response, 503, code="damaged_version")
    assert response.headers["x-errata-version"] == "0"
    counted = 'errata_gateway_requests_total{outcome="unavailable",version="0"} 1.0'
    assert counted in api.get("/metrics").text


def test_a_running_stream_keeps_its_version(
    redis_server: RedisServer,
    tokenizer_folder: Path,
    stores: Stores,
    worker: ScriptedWorker,
    streaming_node: StreamingNode,
) -> None:
    commit(stores, 1, VersionState.VERIFIED)
    settings = Settings(
        redis_url=redis_server.url, model=str(tokenizer_folder), nodes=(streaming_node.address,), auth="required"
    )
    key = stores.keys.create("streamer", [Scope.INFER]).key
    with (
        serving(settings) as url,
        httpx.Client(base_url=url, timeout=10, headers={"Authorization": f"Bearer {key}"}) as client,
        client.stream("POST", "/v1/completions", json={**ASK, "stream": True}) as response,
    ):
        assert response.headers["x-errata-version"] == "0"
        assert response.headers["content-type"].startswith("text/event-stream")
        pieces = response.iter_raw()
        assert next(pieces) == b"data: first\n\n", "a piece is passed on before the next one exists"
        stores.registry.activate(1)
        streaming_node.go_on.set()
        assert b"".join(pieces) == b"data: second\n\n"
    [body] = streaming_node.models
    assert b"errata@0" in body


class TalkativeNode(BaseHTTPRequestHandler):
    """Keeps the headers it gets, and answers with some that are nobody's business."""

    protocol_version = "HTTP/1.1"
    got: ClassVar[list[dict[str, str]]] = []

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        streamed = b'"stream": true' in self.rfile.read(int(self.headers["content-length"]))
        self.got.append({name.lower(): value for name, value in self.headers.items()})
        self._answer(b"data: x\n\n" if streamed else b"{}", "text/event-stream" if streamed else "application/json")

    def _answer(self, content: bytes, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        for name in ("Keep-Alive", "Proxy-Authenticate", "Trailer", "Upgrade", "X-Internal", "Set-Cookie", "Via"):
            self.send_header(name, "node")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("stream", [False, True])
def test_no_header_goes_through(
    redis_server: RedisServer, tokenizer_folder: Path, stores: Stores, worker: ScriptedWorker, stream: bool
) -> None:
    """The client's key stays with the service, the node's token with the node."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), TalkativeNode)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    token = "the-nodes-token"
    settings = Settings.model_validate(
        {
            "redis_url": redis_server.url,
            "model": str(tokenizer_folder),
            "nodes": f"http://127.0.0.1:{server.server_address[1]}",
            "node_token": token,
        }
    )
    sent = dict.fromkeys(
        (
            "Authorization",
            "Cookie",
            "X-Forwarded-For",
            "X-Request-Id",
            "TE",
            "Upgrade",
            "Proxy-Authorization",
            "X-Mine",
        ),
        "clients-own",
    )
    with serving(settings) as url:
        response = httpx.post(f"{url}/v1/completions", json={**ASK, "stream": stream}, headers=sent)
    server.shutdown()
    thread.join()
    server.server_close()
    got = TalkativeNode.got.pop()
    assert got.pop("authorization") == f"Bearer {token}"
    assert "clients-own" not in got.values()
    assert set(got) <= {
        "host", "accept", "accept-encoding", "connection", "user-agent", "content-length", "content-type",
    }  # fmt: skip
    assert response.status_code == 200
    assert token not in str(response.headers)
    assert set(response.headers) <= {
        "date", "server", "content-type", "content-length", "transfer-encoding", "x-errata-version", "x-request-id",
    }  # fmt: skip
    assert "node" not in response.headers.values()


def test_a_client_that_goes_in_the_middle_of_a_stream_is_counted_and_leaves_nothing_behind(
    redis_server: RedisServer,
    tokenizer_folder: Path,
    stores: Stores,
    worker: ScriptedWorker,
    streaming_node: StreamingNode,
) -> None:
    streaming_node.go_on.clear()
    settings = Settings(redis_url=redis_server.url, model=str(tokenizer_folder), nodes=(streaming_node.address,))
    with serving(settings) as url:
        with (
            httpx.Client(base_url=url, timeout=10) as client,
            client.stream("POST", "/v1/completions", json={**ASK, "stream": True}) as response,
        ):
            pieces = response.iter_raw()
            assert next(pieces) == b"data: first\n\n"
            assert "errata_gateway_requests_in_flight 1.0" in httpx.get(f"{url}/metrics").text
        deadline = time.monotonic() + 10
        while "errata_gateway_requests_in_flight 0.0" not in (measured := httpx.get(f"{url}/metrics").text):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    streaming_node.go_on.set()
    assert 'errata_gateway_requests_total{outcome="aborted",version="0"} 1.0' in measured
    assert 'errata_gateway_first_byte_seconds_count{streamed="true"} 1.0' in measured


def test_a_request_is_a_503_while_all_nodes_are_away(
    redis_server: RedisServer, tokenizer_folder: Path, stores: Stores, worker: ScriptedWorker
) -> None:
    settings = Settings(
        redis_url=redis_server.url, model=str(tokenizer_folder), nodes=(f"http://127.0.0.1:{free_port()}",)
    )
    with serving(settings) as url, httpx.Client(base_url=url, timeout=10) as client:
        response = client.post("/v1/completions", json=ASK)
    assert_error(response, 503, code="no_ready_node")
    assert response.headers["x-errata-version"] == "0"
