"""More than the service can do, clients that stall, and a service that is told to stop: over real connections."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest
from redis_server import RedisServer
from scripted_worker import ScriptedWorker, fact
from service_process import assert_error, serving

from service import programs
from service.api.middleware import PACE_BYTES
from service.errors import BusyError
from service.ports import free_port
from service.settings import Settings
from service.store import EditStore, Idempotency, _new
from service.stores import Stores

pytestmark = pytest.mark.timeout(90)

ASK = {"model": "errata", "prompt": "a", "stream": True}
LIVE = b"GET /health/live HTTP/1.1\r\nhost: a\r\n\r\n"


@pytest.fixture
def small(stores: Stores, settings: Settings) -> EditStore:
    """A store whose queue takes three edits."""
    return EditStore(stores.redis, events_max=100, idempotency_ttl_s=60, max_attempts=3, queue_max_edits=3)


def test_a_full_queue_takes_no_part_of_a_batch(small: EditStore) -> None:
    small.submit([fact("a", "1"), fact("b", "1")])
    with pytest.raises(BusyError, match="2 edits wait to be learned, 3 may") as error:
        small.submit([fact("c", "1"), fact("d", "1")])
    assert (error.value.status, error.value.code, error.value.headers["Retry-After"]) == (429, "queue_full", "30")
    assert {edit.prompt for edit in small.page(status=None, q=None, after=None, limit=10).data} == {"a", "b"}
    small.submit([fact("c", "1")])


def test_an_edit_that_was_taken_before_the_queue_filled_is_answered_again(small: EditStore) -> None:
    once = Idempotency.of("key", "/edits", b"body")
    first = small.submit([fact("a", "1")], once)
    small.submit([fact("b", "1"), fact("c", "1")])
    assert small.submit([fact("a", "1")], once) == first


def test_a_call_that_is_repeated_because_its_answer_was_lost_finds_its_edit_in_a_full_queue(small: EditStore) -> None:
    payload = {"edits": [_new(fact("a", "1"), 0)], "idempotency": None, "status": "queued"}
    first = small._submit({**payload, "queue_max_edits": 1})
    assert small._submit({**payload, "queue_max_edits": 0}) == first


def test_edits_in_training_fill_the_queue_and_learned_ones_do_not(
    small: EditStore, stores: Stores, worker: ScriptedWorker
) -> None:
    small.submit([fact(prompt, "1") for prompt in "abc"])
    run, members = worker.begin()
    with pytest.raises(BusyError):
        small.submit([fact("d", "1")])
    worker.commit(run, members)
    small.submit([fact("d", "1")])


def test_the_api_says_when_to_come_back_and_an_import_which_lines_to_repeat(
    redis_server: RedisServer, tokenizer_folder: Path, stores: Stores
) -> None:
    settings = Settings(
        redis_url=redis_server.url, model=str(tokenizer_folder), nodes=("http://127.0.0.1:1",), queue_max_edits=2
    )
    lines = "".join(f'{{"prompt": "p{number}", "target": "1"}}\n' for number in range(201))
    with serving(settings) as url, httpx.Client(base_url=url, timeout=10) as client:
        # Lines are stored by the two hundred: the first chunk does not fit, the one line behind it does.
        report = client.post("/edits/import", content=lines).json()
        assert (report["accepted"], report["rejected"]) == (1, 200)
        assert report["errors"][0] | {"message": ""} == {"line": 1, "message": "", "param": None, "code": "queue_full"}
        assert client.post("/edits", json={"prompt": "a", "target": "1"}).status_code == 202
        refused = client.post("/edits", json={"prompt": "b", "target": "1"})
    assert_error(refused, 429, code="queue_full")
    assert refused.headers["retry-after"] == "30"


class EndlessNode:
    """Streams pieces without an end, or until it is told."""

    def __init__(self) -> None:
        self.piece = b"data: piece\n\n"
        self.every_s = 0.05
        self.kind = "text/event-stream"
        self.end = threading.Event()
        self.reached = threading.Event()
        self.broken_off = threading.Event()
        node = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                node.reached.set()
                self.send_response(200)
                self.send_header("content-type", node.kind)
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                try:
                    while not node.end.wait(node.every_s):
                        self._write(node.piece)
                    self._write(b"data: [DONE]\n\n")
                    self._write(b"")
                except OSError:
                    node.broken_off.set()

            def _write(self, content: bytes) -> None:
                self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def endless() -> Iterator[EndlessNode]:
    node = EndlessNode()
    thread = threading.Thread(target=node.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield node
    node.end.set()
    node.server.shutdown()
    thread.join()
    node.server.server_close()


@pytest.fixture
def pressed(
    redis_server: RedisServer, tokenizer_folder: Path, worker: ScriptedWorker, endless: EndlessNode
) -> Settings:
    """Settings of a gateway that answers one request at a time and waits half a second for its clients."""
    return Settings(
        redis_url=redis_server.url,
        model=str(tokenizer_folder),
        nodes=(endless.address,),
        gateway_max_answers=1,
        client_timeout_s=0.5,
        shutdown_grace_s=10,
    )


def test_the_gateway_takes_no_more_requests_than_it_may(pressed: Settings, endless: EndlessNode) -> None:
    with serving(pressed) as url, httpx.Client(base_url=url, timeout=10) as client:
        with client.stream("POST", "/v1/completions", json=ASK) as response:
            pieces = response.iter_raw()
            next(pieces)
            refused = client.post("/v1/completions", json=ASK)
            assert_error(refused, 429, code="too_busy")
            assert refused.headers["retry-after"] == "1"
            endless.end.set()
            list(pieces)
        with client.stream("POST", "/v1/completions", json=ASK) as response:
            assert response.status_code == 200


def test_a_client_that_does_not_take_its_answer_gives_its_place_back(pressed: Settings, endless: EndlessNode) -> None:
    # Enough to fill every buffer on the way. A node that never pauses would be read on a while behind a client that is
    # gone: a stream is cancelled where it waits.
    endless.piece, endless.every_s = b"data: " + b"x" * 2**20 + b"\n\n", 0.01
    with serving(pressed) as url:
        with connection(url) as stalled:
            stalled.sendall(request("/v1/completions", b'{"model": "errata", "prompt": "a", "stream": true}'))
            stalled.recv(1024)
            assert endless.broken_off.wait(20), "the node is relieved of a stream that nobody takes"
        endless.end.set()
        assert httpx.post(f"{url}/v1/completions", json=ASK).status_code == 200


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_a_client_that_leaves_before_its_answer_relieves_the_node(
    pressed: Settings, endless: EndlessNode, kind: str
) -> None:
    endless.kind, endless.every_s = kind, 3.0
    with serving(pressed) as url, httpx.Client(base_url=url, timeout=10) as other:
        with connection(url) as client:
            client.sendall(request("/v1/completions", b'{"model": "errata", "prompt": "a"}'))
            assert endless.reached.wait(20)
            began = time.monotonic()
        while "errata_gateway_requests_in_flight 0.0" not in (measured := other.get("/metrics").text):
            assert time.monotonic() < began + 2, "before the node's first piece"
        assert endless.broken_off.wait(20)
    assert 'errata_gateway_requests_total{outcome="aborted",version="0"} 1.0' in measured


def test_a_connection_whose_client_takes_nothing_is_ended(pressed: Settings, endless: EndlessNode) -> None:
    """A stream's, and one that is closed behind its last answer."""
    endless.piece, endless.every_s = b"data: " + b"x" * 2**20 + b"\n\n", 0.01
    last = b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    long_answers = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 100
    with serving(pressed) as url:
        for sent in (
            request("/v1/completions", b'{"model": "errata", "prompt": "a", "stream": true}'),
            long_answers + last,
        ):
            with connection(url) as stalled:
                stalled.sendall(sent)
                stalled.recv(1024)
                assert open_for(stalled)
                deadline = time.monotonic() + 20
                while open_for(stalled):
                    assert time.monotonic() < deadline
                    time.sleep(0.1)


def test_a_client_that_takes_its_answer_slowly_is_not_given_up(pressed: Settings, endless: EndlessNode) -> None:
    endless.piece, endless.every_s = b"data: " + b"x" * 2**20 + b"\n\n", 0.01
    with serving(pressed) as url, connection(url) as slow:
        slow.settimeout(20)
        slow.sendall(request("/v1/completions", b'{"model": "errata", "prompt": "a", "stream": true}'))
        deadline = time.monotonic() + 8 * pressed.client_timeout_s
        while time.monotonic() < deadline:
            assert slow.recv(4096)
            time.sleep(0.05)
        assert not endless.broken_off.is_set()


def test_a_client_that_stops_in_its_body_is_told(pressed: Settings) -> None:
    with serving(pressed) as url:
        for path in ("/edits", "/edits/import"):
            with connection(url) as client:
                client.sendall(request(path, b'{"prompt": ', length=1000))
                client.settimeout(20)
                assert client.recv(4096).startswith(b"HTTP/1.1 408 "), path


def test_a_client_that_breaks_off_its_body_is_no_error_of_ours(
    pressed: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(pressed) as url:
        caplog.set_level(logging.INFO)
        for path in ("/edits", "/edits/import"):
            with connection(url) as client:
                client.sendall(request(path, b'{"prompt": ', length=1000))
                time.sleep(0.1)
        deadline = time.monotonic() + 20
        while (measured := httpx.get(f"{url}/metrics").text).count('status="499"') < 2:
            assert time.monotonic() < deadline, measured
            time.sleep(0.05)
    assert 'status="500"' not in measured
    assert 'route="/edits/import",status="499"' in measured
    assert [record.path for record in caplog.records if record.message == "request.aborted"] == [
        "/edits",
        "/edits/import",
    ]
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_body_that_drips_is_given_up(pressed: Settings) -> None:
    with serving(pressed) as url:
        for path in ("/edits", "/edits/import"):
            with connection(url) as client:
                client.sendall(request(path, b"", length=1000))
                assert dripping(client, b"a").startswith(b"HTTP/1.1 408 "), path


def test_no_body_is_waited_for_where_no_key_is_asked_for(pressed: Settings) -> None:
    """Nor does the connection stay for it, or turn what is answered twice."""
    with serving(pressed) as url:
        for framing in (b"content-length: 1000", b"transfer-encoding: chunked"):
            with connection(url) as client:
                client.settimeout(20)
                client.sendall(b"GET /health/live HTTP/1.1\r\nhost: a\r\n" + framing + b"\r\n\r\n")
                assert_live(client)
                part = b"a" if b"length" in framing else b"1\r\na\r\n"
                assert dripping(client, part) == b""


def test_a_body_that_ends_behind_its_answer_leaves_a_connection_that_ends(pressed: Settings) -> None:
    with serving(pressed) as url, connection(url) as client:
        client.settimeout(20)
        client.sendall(b"GET /health/live HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n")
        assert_live(client)
        client.sendall(b"body" + LIVE)
        assert_live(client)
        client.sendall(b"GET /health/live HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\n")
        assert_live(client)
        client.sendall(b"body")
        assert client.recv(4096).startswith(b"HTTP/1.1 408 ")
        assert client.recv(4096) == b""


def test_headers_that_do_not_end_are_given_up(pressed: Settings) -> None:
    """The first request's, those behind an answer, and those that come byte by byte."""
    with serving(pressed) as url:
        for begun in (b"", b"GET /health/live HTTP/1.1\r\nhost: a\r\n\r\n"):
            with connection(url) as client:
                client.settimeout(20)
                client.sendall(begun)
                answer, deadline = b"", time.monotonic() + 20
                while begun and not answer.endswith(b'{"status":"ok"}'):
                    answer += client.recv(4096)
                client.sendall(b"GET /health/live HTTP/1.1\r\nhost: ")
                client.settimeout(0.1)
                answer = b""
                while not answer:
                    assert time.monotonic() < deadline
                    client.sendall(b"a")
                    with suppress(TimeoutError):
                        answer = client.recv(4096)
                assert answer.startswith(b"HTTP/1.1 408 ")
                assert answer.endswith(b"\r\n\r\n")
        with connection(url) as silent:
            silent.settimeout(20)
            assert silent.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_endless_headers_are_refused(pressed: Settings) -> None:
    with serving(pressed.model_copy(update={"client_timeout_s": 60})) as url, connection(url) as client:
        client.settimeout(20)
        client.sendall(b"GET /health/live HTTP/1.1\r\nx: ")
        # Nothing of it is a whole header, so that only what is kept of it can be counted.
        with suppress(OSError):
            for _ in range(1000):
                client.sendall(b"a" * 4096)
                time.sleep(0.001)
        assert client.recv(4096).startswith(b"HTTP/1.1 431 ")


def test_endless_trailers_are_refused(pressed: Settings) -> None:
    head = b"POST /edits HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"
    with serving(pressed.model_copy(update={"client_timeout_s": 60})) as url:
        for field in (b"x: " + b"a" * 1000 + b"\r\n", b"a" * 1000):
            with connection(url) as client:
                client.settimeout(20)
                client.sendall(head + b"x: ")
                with suppress(OSError):
                    for _ in range(4000):
                        client.sendall(field)
                        time.sleep(0.001)
                assert client.recv(4096).startswith(b"HTTP/1.1 431 ")


def test_a_trailer_is_no_header(pressed: Settings, stores: Stores) -> None:
    with serving(pressed) as url:
        for target in (b"1", b"2"):
            body = b'{"prompt": "a", "target": "%s"}' % target
            with connection(url) as client:
                client.settimeout(20)
                client.sendall(
                    b"POST /edits HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                    b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\nidempotency-key: k\r\n\r\n" % (len(body), body)
                )
                assert client.recv(4096).startswith(b"HTTP/1.1 202 ")


@pytest.mark.parametrize("behind", [b"\r\n", LIVE[:15]], ids=["line end", "part of a request"])
def test_what_comes_behind_a_request_may_wait_for_its_answer(
    pressed: Settings, endless: EndlessNode, behind: bytes
) -> None:
    endless.every_s = 0.2
    with serving(pressed) as url, connection(url) as client:
        client.settimeout(20)
        client.sendall(request("/v1/completions", b'{"model": "errata", "prompt": "a", "stream": true}'))
        answer = client.recv(4096)
        client.sendall(behind)
        began = time.monotonic()
        while not answer.endswith(b"0\r\n\r\n"):
            received = client.recv(4096)
            assert received, answer
            answer += received
            if time.monotonic() > began + 3 * pressed.client_timeout_s:
                endless.end.set()
        assert answer.count(b"HTTP/1.1 ") == 1
        client.sendall(LIVE.removeprefix(behind))
        assert_live(client)


@pytest.mark.parametrize(
    "behind", [b"no HTTP\r\n\r\n", LIVE[:-2] + b"x: " + b"a" * 2**19], ids=["no HTTP", "endless headers"]
)
def test_what_is_refused_behind_a_request_is_not_answered_into_its_answer(
    pressed: Settings, endless: EndlessNode, behind: bytes
) -> None:
    with serving(pressed) as url, connection(url) as client:
        client.settimeout(20)
        client.sendall(request("/v1/completions", b'{"model": "errata", "prompt": "a", "stream": true}'))
        answer = client.recv(4096)
        with suppress(OSError):
            client.sendall(behind)
            while received := client.recv(4096):
                answer += received
        assert answer.count(b"HTTP/1.1 ") == 1


def test_a_long_body_in_time_and_a_slow_answer_are_no_slow_headers(pressed: Settings, endless: EndlessNode) -> None:
    endless.every_s = 0.2
    patience_s = 1.0
    settings = pressed.model_copy(update={"client_timeout_s": patience_s})
    with serving(settings) as url, connection(url) as client:
        client.settimeout(20)
        body = b'{"model": "errata", "prompt": "a", "stream": true}' + b" " * 6 * PACE_BYTES
        client.sendall(request("/v1/completions", b"", length=len(body)))
        for byte in range(0, len(body), PACE_BYTES):
            time.sleep(patience_s / 4)
            client.sendall(body[byte : byte + PACE_BYTES])
        began, answer = time.monotonic(), b""
        while time.monotonic() < began + 2 * patience_s:
            answer += client.recv(4096)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"piece") > 3
        endless.end.set()
        while b"[DONE]" not in answer:
            answer += client.recv(4096)


def test_a_service_that_is_told_to_stop_ends_its_streams_first(
    pressed: Settings, endless: EndlessNode, tmp_path: Path, stores: Stores
) -> None:
    [edit] = stores.edits.submit([fact("a", "1")])
    with started(pressed, tmp_path) as (url, process), httpx.Client(base_url=url, timeout=30) as client:
        follower = threading.Thread(target=lambda: httpx.get(f"{url}/events", timeout=30))
        waiter = threading.Thread(target=lambda: httpx.get(f"{url}/edits/{edit.id}/status?wait=60", timeout=30))
        follower.start()
        waiter.start()
        with client.stream("POST", "/v1/completions", json=ASK) as response:
            pieces = response.iter_raw()
            next(pieces)
            deadline = time.monotonic() + 20
            while "errata_http_requests_in_flight 4.0" not in httpx.get(f"{url}/metrics").text:
                assert time.monotonic() < deadline, "the stream, the two and this one"
            process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.TransportError):
                while time.monotonic() < deadline:
                    httpx.get(f"{url}/health/live")
            endless.end.set()
            assert b"".join(pieces).endswith(b"data: [DONE]\n\n")
        # Both would have gone on for a minute at least; the events are looked up every five seconds.
        assert process.wait(pressed.shutdown_grace_s - 1) in {0, -signal.SIGTERM}
        follower.join(1)
        waiter.join(1)
        assert not follower.is_alive()
        assert not waiter.is_alive()


def test_every_line_of_the_services_log_is_json(pressed: Settings, tmp_path: Path) -> None:
    with started(pressed, tmp_path) as (url, process):
        with connection(url) as client:
            client.sendall(b"no HTTP\r\n\r\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 400 ")
        process.send_signal(signal.SIGTERM)
        process.wait(pressed.shutdown_grace_s)
    said = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert all({"at", "level", "event", "logger"} <= set(line) for line in said)
    assert {line["event"] for line in said} >= {"Application startup complete.", "Invalid HTTP request received."}


@contextmanager
def started(settings: Settings, folder: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The service as a process of its own, as the stack starts it."""
    settings = settings.model_copy(update={"port": free_port()})
    environment = {**os.environ, **settings.environment(), "ERRATA_REDIS_URL": settings.redis_url}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    url = f"http://127.0.0.1:{settings.port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(programs.service().command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 40
        while True:
            try:
                httpx.get(f"{url}/health/live")
                break
            except httpx.TransportError:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()


def connection(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return client


def assert_live(client: socket.socket) -> None:
    """Reads one answer to ``LIVE``."""
    answer = b""
    while not answer.endswith(b'{"status":"ok"}'):
        received = client.recv(4096)
        assert received, answer
        answer += received
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 ") == 1


def dripping(client: socket.socket, part: bytes) -> bytes:
    """What is answered, or the connection's end (nothing), while parts are sent one by one."""
    client.settimeout(0.1)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            client.sendall(part)
            return client.recv(4096)
        except TimeoutError:
            continue
        except OSError:
            return b""
    raise AssertionError("still open")


def open_for(client: socket.socket) -> bool:
    """Whether the service, a thread of this process, has a socket for the client."""
    peer = client.getsockname()
    return any(found.raddr == peer for found in psutil.Process().net_connections("tcp"))


def request(path: str, body: bytes, *, length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body
