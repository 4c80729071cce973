"""Traces over the real processes, from a request to the activation, as a real OTLP receiver gets them."""

import importlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from otlp_receiver import Received, Receiver, receiving
from redis_server import RedisServer
from scripted_node import TOKEN, ScriptedNode, listening
from tiny_models import tiny_model, tiny_tokenizer
from waiting import until

from service import programs
from service.ports import free_port
from service.queue import CONTROL_QUEUE, TRAIN_QUEUE, TaskQueue
from service.schemas import EditStatus
from service.settings import Settings
from service.stores import Stores
from service.tracing import continued, outgoing

# Three processes that import all they need, on a machine that may be busy.
pytestmark = pytest.mark.timeout(900)

KEY = "key-that-is-in-no-trace-0123456789"
PROMPTS = ("the first secret prompt", "the second secret prompt")
TARGET = "secret target"
QUESTION = "a secret question"
CLIENTS = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@dataclass(frozen=True)
class Story:
    """What was received, and with which headers the node was asked what, after two edits became live."""

    receiver: Receiver
    spans: list[Received]
    asked: list[tuple[str, dict[str, str]]]

    def one(self, service: str, name: str) -> Received:
        [found] = [span for span in self.spans if (span.service, span.name) == (service, name)]
        return found

    def posts(self) -> list[Received]:
        return [span for span in self.spans if span.name == "POST /edits"]


class TracedNode(ScriptedNode):
    """Has learned both edits at version 1, and holds every version as it was trained."""

    def __init__(self, stores: Stores) -> None:
        super().__init__()
        self.stores = stores
        self.teach(1, dict.fromkeys(PROMPTS, TARGET))

    def _checksum(self, version: int) -> dict[str, object]:
        return {"version": version, "tensors": self.stores.registry.get(version).tensors}


@pytest.fixture(scope="module")
def story(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    home = tmp_path_factory.mktemp("traced")
    tiny_model().save_pretrained(home / "model")
    tiny_tokenizer().save_pretrained(home / "model")
    stores = Stores.connect(Settings(redis_url=redis_server.url))
    stores.redis.flushdb()
    node = TracedNode(stores)
    with receiving() as receiver, listening(node) as address:
        settings = {
            "HOME": home,
            "REDIS_URL": redis_server.url,
            "NODES": address,
            "NODE_TOKEN": TOKEN,
            "MODEL": home / "model",
            "API_KEY": KEY,
            "AUTH": "required",
            "TRIGGER": "batch",
            "TRIGGER_BATCH_EDITS": 2,
            "TRIGGER_MAX_WAIT_S": 3600,
            "TRAIN_MAX_EPOCHS": 2,
            "TRAIN_PRESERVE": 0,
            "GATE_MIN_RELIABILITY": 0,
            "GATE_MAX_PERPLEXITY_RATIO": 1e9,
            "MAX_MODEL_LEN": 200,
            "EDIT_MAX_TOKENS": 64,
            "DEVICE": "cpu",
            # What the check asks of nodes is in no trace.
            "ANSWER_CHECK_S": 0,
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("ERRATA_", "OTEL_"))}
        environment |= {f"ERRATA_{name}": str(value) for name, value in settings.items()}
        environment["OTEL_EXPORTER_OTLP_ENDPOINT"] = receiver.url
        act(environment, home, stores)
        yield Story(receiver, receiver.spans(), node.asked_with)
    stores.redis.flushdb()
    stores.redis.close()


def act(environment: dict[str, str], home: Path, stores: Stores) -> None:
    """Starts the processes, submits two edits and waits until they are live, asks the gateway; stops the processes."""
    port = free_port()
    settings = Settings(home=home, port=port)
    environment = environment | {"ERRATA_PORT": str(port)}

    def logged() -> str:
        return "\n".join(log.read_text()[-3000:] for log in home.glob("*.log"))

    with ExitStack() as processes:
        for program in (*programs.workers(settings), programs.service()):
            processes.enter_context(running(program.command, environment, home / f"{program.name}.log"))
        until(lambda: bool(stores.runs.workers(within_s=60)), within_s=300, otherwise=logged)
        headers = {"authorization": f"Bearer {KEY}", "baggage": "secret=luggage", "tracestate": "secret=state"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
            first = {"prompt": PROMPTS[0], "target": TARGET}
            client.post("/edits", json=first, headers={"traceparent": CLIENTS}).raise_for_status()
            second = {"prompt": PROMPTS[1], "target": TARGET}
            client.post("/edits", json=second, headers={"x-request-id": "mine"}).raise_for_status()
            until(lambda: stores.edits.counts()[EditStatus.LIVE] == 2, within_s=300, otherwise=logged)
            client.get("/edits", params={"q": TARGET}).raise_for_status()
            assert client.get("/secret-path").status_code == 404
            assert client.get("/health/live").is_success
            client.post("/v1/completions", json={"model": "errata", "prompt": QUESTION}).raise_for_status()


@contextmanager
def running(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    """A process that is told to stop at the end, which then has its last spans sent."""
    with log.open("w") as file:
        started = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield
            started.terminate()
            # Uvicorn ends by the signal that it was told to stop with, once it has stopped.
            assert started.wait(60) in {0, -signal.SIGTERM}, log.read_text()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait(10)


def test_one_trace_leads_from_the_request_to_the_activation(story: Story) -> None:
    before, post = story.posts()
    run, publish = story.one("errata-train", "run"), story.one("errata-control", "publish")
    steps = [(story.one("errata-train", phase), run) for phase in ("train", "evaluate", "commit")]
    steps += [(story.one("errata-control", step), publish) for step in ("load", "verify", "activate")]
    # One without a parent is of a tick that came before the message; its links lead back.
    steps += [(child, parent) for child, parent in ((run, post), (publish, run)) if child.parent]
    for child, parent in steps:
        assert (child.trace, child.parent) == (parent.trace, parent.id), child.name
    assert before.trace != post.trace
    assert story.one("errata-control", "activate").attributes == {"errata.version": 1}
    assert run.attributes["errata.run"] == publish.attributes["errata.run"]
    assert post.service == "errata-service"


@pytest.mark.parametrize(("task", "waiting"), [("train", TRAIN_QUEUE), ("publish", CONTROL_QUEUE)])
def test_a_message_carries_the_trace_of_who_sends_it(queue: TaskQueue, stores: Stores, task: str, waiting: str) -> None:
    with continued({"traceparent": CLIENTS}):
        getattr(queue, task)("run_1")
    [message] = stores.redis.lrange(waiting, 0, -1)
    assert json.loads(message)["headers"]["traceparent"] == CLIENTS


def test_a_publication_goes_on_with_the_trace_of_its_message(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_REDIS_URL", redis_server.url)
    control = importlib.import_module("service.control")
    told: list[str] = []
    monkeypatch.setattr(control._reconciler, "publish", lambda _: told.append(outgoing()["traceparent"]))
    control.publish.push_request(traceparent=CLIENTS)
    try:
        control.publish.run("run_1")
    finally:
        control.publish.pop_request()
    assert told == [CLIENTS]


def test_the_requests_of_every_edit_are_linked(story: Story) -> None:
    posts = {(post.trace, post.id) for post in story.posts()}
    assert len(posts) == 2
    assert story.one("errata-train", "run").links == posts
    assert story.one("errata-control", "publish").links == posts


def test_a_request_goes_on_with_its_clients_trace(story: Story) -> None:
    first, second = story.posts()
    assert f"00-{first.trace}-{first.parent}-01" == CLIENTS
    assert second.parent == ""
    assert second.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 202,
        "http.route": "/edits",
        "errata.request_id": "mine",
    }


def test_the_node_is_told_the_trace_and_nothing_else_of_the_client(story: Story) -> None:
    answered = story.one("errata-service", "POST /v1/completions")
    told = {prompt: tuple(headers["traceparent"].split("-")[1:3]) for prompt, headers in story.asked}
    assert told[QUESTION] == (answered.trace, answered.id)
    verify = story.one("errata-control", "verify")
    for prompt in PROMPTS:
        assert told[prompt] == (verify.trace, verify.id)
    assert {"baggage", "tracestate"}.isdisjoint(name for _, headers in story.asked for name in headers)


def test_no_text_of_a_client_and_no_secret_is_exported(story: Story) -> None:
    exported = b"".join(story.receiver.bodies)
    assert b"POST /edits" in exported
    for secret in (b"secret", KEY.encode(), TOKEN.encode(), b"luggage", b"redis://"):
        assert secret not in exported


def test_what_is_asked_every_few_seconds_is_in_no_trace(story: Story) -> None:
    named = {(span.service, span.name) for span in story.spans}
    assert named == {
        *(("errata-service", name) for name in ("POST /edits", "GET /edits", "GET", "POST /v1/completions")),
        *(("errata-train", name) for name in ("run", "train", "evaluate", "commit")),
        *(("errata-control", name) for name in ("publish", "load", "verify", "activate")),
    }
