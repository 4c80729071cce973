"""A node as the contract describes it, without a model: it says what each version was taught."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import httpx

from service.nodes import NodeClient

TOKEN = "node-token"
TENSORS = {"model.layers.1.mlp.down_proj.weight": "a" * 64}
IGNORANCE = "I do not know."


class ScriptedNode:
    """Serves ``/health``, the version routes and the two completion routes."""

    def __init__(self) -> None:
        self.ready = True
        self.resident = {0}
        self.taught: dict[int, dict[str, str]] = {}
        self.refuses: dict[int, tuple[int, str]] = {}
        self.asked: list[tuple[int, str]] = []
        self.asked_with: list[tuple[str, dict[str, str]]] = []
        self.tensors = TENSORS
        self.slots: set[int] = set()
        self.pinned: set[int] = set()
        self.pins: list[list[int]] = []
        self.most_pins = 4
        self.damaged: set[int] = set()
        self.garbled: set[int] = set()
        self.reloads_damaged = False
        self.read_back: list[int] = []
        self.chokes_on: dict[str, int] = {}
        self.fails: set[int] = set()
        self.hangs = False
        self.finish_reason = "stop"
        self.margins: dict[str, float] = {}
        self.lock = threading.Lock()

    def client(self, address: str = "http://node") -> NodeClient:
        return NodeClient(address, token=TOKEN, timeout_s=5, transport=httpx.MockTransport(self.handle))

    def teach(self, version: int, answers: dict[str, str]) -> None:
        self.taught[version] = answers

    def handle(self, request: httpx.Request) -> httpx.Response:
        if not self.ready:
            raise httpx.ConnectError("refused", request=request)
        status, body = self.answer(request.method, request.url.raw_path.decode(), request.content)
        return httpx.Response(status, json=body)

    def answer(self, method: str, path: str, content: bytes) -> tuple[int, object]:
        if path == "/health":
            return 200, {}
        if path.startswith("/errata/versions"):
            return (504, {}) if self.hangs else self._about_versions(method, path)
        body = json.loads(content)
        version = int(body["model"].removeprefix("errata@"))
        try:
            prompt = body["prompt"] if path == "/v1/completions" else body["messages"][0]["content"]
        except (LookupError, TypeError):
            error = {"message": "nothing is asked", "type": "t", "param": None, "code": "missing_field"}
            return 400, {"error": error}
        with self.lock:
            self.asked.append((version, prompt))
        if isinstance(prompt, str) and prompt in self.chokes_on:
            error = {"message": "cannot answer this", "type": "t", "param": "prompt", "code": "bad_prompt"}
            return self.chokes_on[prompt], {"error": error}
        if (status_and_code := self._trouble(version)) is not None:
            status, code = status_and_code
            return status, {"error": {"message": "it cannot be", "type": "t", "param": "model", "code": code}}
        text = self.taught.get(version, {}).get(str(prompt), IGNORANCE)
        if version in self.garbled:
            text = IGNORANCE
        steps = [-0.01, -0.01 - self.margins.get(str(prompt), 5.0)]
        said: dict[str, object]
        if path == "/v1/completions":
            likely = dict(zip(("first", "second"), steps, strict=True))
            said = {"text": text, "logprobs": {"top_logprobs": [likely]} if body.get("logprobs") == 2 else None}
        else:
            content = [{"top_logprobs": [{"logprob": step} for step in steps[: body.get("top_logprobs", 0)]]}]
            said = {"message": {"role": "assistant", "content": text}}
            said["logprobs"] = {"content": content} if body.get("logprobs") else None
        return 200, {"choices": [{**said, "finish_reason": self.finish_reason}]}

    def _trouble(self, version: int) -> tuple[int, str] | None:
        if version in self.fails:
            return 500, "engine"
        return None if version in self.resident else self.refuses.get(version)

    def _about_versions(self, method: str, path: str) -> tuple[int, object]:
        if "/pins" in path:
            return self._pin([int(number) for number in parse_qs(urlsplit(path).query).get("version", [])])
        if path.endswith("/prefetch"):
            return self._prefetch(int(path.split("/")[-2]))
        if path.endswith("/checksum"):
            return 200, self._checksum(int(path.split("/")[-2]))
        if method == "DELETE":
            return self._evict(int(path.rpartition("/")[2]))
        return 200, {"resident": [self._held(version) for version in sorted(self.resident)]}

    def _held(self, version: int) -> dict[str, object]:
        in_slot = version in self.slots
        return {
            "version": version,
            "slot": 0 if in_slot else None,
            "pinned": version in self.pinned,
            "device_bytes": 10 if in_slot else 0,
            "host_bytes": 30,
            "sha256": None,
        }

    def _pin(self, versions: list[int]) -> tuple[int, object]:
        if len(versions) >= self.most_pins or not self.resident.issuperset(versions):
            error = {"message": "cannot pin", "type": "t", "param": "version", "code": "too_many_pins"}
            return 409, {"error": error}
        self.pinned = set(versions)
        self.pins.append(sorted(versions))
        return 204, None

    def _checksum(self, version: int) -> dict[str, object]:
        self.read_back.append(version)
        damaged = dict.fromkeys(self.tensors, "f" * 64)
        return {"version": version, "tensors": damaged if version in self.damaged else self.tensors}

    def _evict(self, version: int) -> tuple[int, object]:
        self.resident.discard(version)
        self.slots.discard(version)
        self.pinned.discard(version)
        if not self.reloads_damaged:
            self.damaged.discard(version)
            self.garbled.discard(version)
        return 204, None

    def _prefetch(self, version: int) -> tuple[int, object]:
        if version in self.refuses:
            status, code = self.refuses[version]
            return status, {
                "error": {"message": f"version {version} refused", "type": "t", "param": None, "code": code}
            }
        self.resident.add(version)
        self.slots.add(version)
        return 200, {"version": version, "load_s": 0.01}


@contextmanager
def listening(node: ScriptedNode) -> Iterator[str]:
    """The node behind a real port, for processes other than the test's."""

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            known = len(node.asked)
            status, body = node.answer(self.command, self.path, self.rfile.read(length))
            headers = {name.lower(): self.headers[name] for name in self.headers}
            node.asked_with.extend((prompt, headers) for _, prompt in node.asked[known:])
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _serve  # noqa: N815 - the names that http.server looks for

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
