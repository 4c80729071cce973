"""From the log alone: which request brought an edit, which run trained it, which version made it live."""

import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from redis_server import RedisServer
from scripted_node import ScriptedNode
from scripted_worker import ScriptedWorker
from service_process import serving

from service.logs import JsonFormatter
from service.queue import TaskQueue
from service.reconcile import Reconciler
from service.schemas import Run, RunStatus
from service.settings import Settings
from service.store import EditStore
from service.stores import Stores
from worker import run as worker_run
from worker.evaluation.gate import GateDecision
from worker.run import Trainer
from worker.run_training import RunTraining
from worker.training.breadth_first import Hooks
from worker.training.errors import TrainingError

pytestmark = pytest.mark.timeout(60)

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def base_url(redis_server: RedisServer, tokenizer_folder: Path) -> Iterator[str]:
    with serving(Settings(redis_url=redis_server.url, model=str(tokenizer_folder), edit_max_tokens=64)) as url:
        yield url


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What every process would have written, as it would have been written."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def train(
    stores: Stores,
    worker: ScriptedWorker,
    node: ScriptedNode,
    queue: TaskQueue,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Run]:
    """Carries out the queued run by the train worker's own code; only the training and the files are played."""
    worker.nodes = [node]

    def run(training: Callable[[Hooks], None] = lambda _: None) -> Run:
        def play(*_: Any, hooks: Hooks, **__: Any) -> SimpleNamespace:
            training(hooks)
            return SimpleNamespace(tensors={})

        def commit(_: Trainer, run: Run, candidate: Any) -> int:
            return worker.commit(run, candidate.trained.claim.members)

        monkeypatch.setattr(worker_run, "decide", lambda *_: GateDecision(passed=True, reasons=()))
        monkeypatch.setattr(Trainer, "_commit", commit)
        played: Any = SimpleNamespace()
        base: Any = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(to_dict=dict)))
        workbench: Any = SimpleNamespace(base=base, train=play, evaluate=lambda *_: None)
        run_training = RunTraining(workbench, played, stores, settings)
        trainer = Trainer(workbench, run_training, played, stores, queue, settings, threading.Event())
        queued = stores.runs.queued()
        assert queued is not None
        trainer.execute(queued.id)
        return stores.runs.get(queued.id)

    return run


def by_event(lines: Lines) -> dict[str, dict[str, Any]]:
    return {line["event"]: line for line in lines()}


def test_one_id_leads_from_the_request_to_the_activation(
    api: httpx.Client, stores: Stores, train: Callable[..., Run], reconciler: Reconciler, lines: Lines
) -> None:
    posted = api.post("/edits", json={"prompt": "a", "target": "1"}, headers={"x-request-id": "mine-1"})
    edit = posted.json()
    assert edit["request_id"] == posted.headers["x-request-id"] == "mine-1"
    assert api.get(f"/edits/{edit['id']}").json()["request_id"] == "mine-1"
    run = train()
    reconciler.publish(run.id)
    assert stores.runs.get(run.id).status is RunStatus.SUCCEEDED

    said = by_event(lines)
    accepted = said["edits.accepted"]
    assert (accepted["request_id"], accepted["new_edits"]) == ("mine-1", 1)
    origins = [{"edit": edit["id"], "request_id": "mine-1"}]
    for event in ("run.claimed", "run.trained", "version.verified", "version.activated", "run.ended"):
        assert (said[event]["run"], said[event]["new_edits"], said[event]["origins"]) == (run.id, 1, origins), event
    assert said["version.activated"]["version"] == said["run.trained"]["version"] == 1
    assert said["run.started"]["run"] == run.id


def test_every_line_of_a_run_names_it_and_those_outside_do_not(
    api: httpx.Client, train: Callable[..., Run], reconciler: Reconciler, lines: Lines
) -> None:
    api.post("/edits", json={"prompt": "a", "target": "1"}, headers={"x-request-id": "first"})

    def training(hooks: Hooks) -> None:
        logging.getLogger("any.library").info("library.said")
        api.post("/edits", json={"prompt": "b", "target": "2"}, headers={"x-request-id": "second"})
        assert len(hooks.arrivals()) == 1

    run = train(training)
    logging.getLogger("any.library").info("library.said_later")
    said = by_event(lines)
    assert said["library.said"]["run"] == run.id
    assert "run" not in said["library.said_later"]
    assert "request_id" not in said["library.said"]
    assert [origin["request_id"] for origin in said["run.claimed"]["origins"]] == ["first"]
    assert [origin["request_id"] for origin in said["run.joined"]["origins"]] == ["second"]
    assert [origin["request_id"] for origin in said["run.trained"]["origins"]] == ["first", "second"]


def test_many_edits_are_counted_and_not_named(
    api: httpx.Client, train: Callable[..., Run], reconciler: Reconciler, lines: Lines
) -> None:
    edits = [{"prompt": f"prompt {number}", "target": "x"} for number in range(9)]
    api.post("/edits/batch", json={"edits": edits}, headers={"x-request-id": "nine"})
    reconciler.publish(train().id)
    said = by_event(lines)
    for event in ("edits.accepted", "run.claimed", "version.activated"):
        assert said[event]["new_edits"] == 9
        assert said[event]["origins"] == []


def test_a_crash_names_its_request(api: httpx.Client, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(EditStore, "get_many", crash)
    assert api.get("/edits/edit_1", headers={"x-request-id": "unlucky"}).status_code == 500
    crashed = by_event(lines)["request.crashed"]
    assert crashed["request_id"] == "unlucky"
    assert "ZeroDivisionError" in crashed["exception"]


def test_a_run_that_fails_leads_back_to_its_request(api: httpx.Client, train: Callable[..., Run], lines: Lines) -> None:
    api.post("/edits", json={"prompt": "a", "target": "1"}, headers={"x-request-id": "first"})

    def diverge(_: Hooks) -> None:
        raise TrainingError("diverged")

    assert train(diverge).status is RunStatus.FAILED
    logging.getLogger("any.library").info("library.said_later")
    said = by_event(lines)
    for event in ("run.crashed", "run.failed"):
        assert [origin["request_id"] for origin in said[event]["origins"]] == ["first"]
    assert "origins" not in said["library.said_later"]


def test_a_rejection_leads_back_to_its_request(
    api: httpx.Client, node: ScriptedNode, train: Callable[..., Run], reconciler: Reconciler, lines: Lines
) -> None:
    body = b'{"prompt": "a", "target": "1"}\n'
    api.post("/edits/import", content=body, headers={"x-request-id": "imported"})
    run = train()
    node.refuses = {1: (409, "damaged_version")}
    reconciler.publish(run.id)
    rejected = by_event(lines)["version.rejected"]
    assert (rejected["run"], rejected["code"], rejected["version"]) == (run.id, "damaged_version", 1)
    assert [origin["request_id"] for origin in rejected["origins"]] == ["imported"]
