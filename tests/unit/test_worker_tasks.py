"""The train worker's shell: what it says of itself, and that it never stays without a model."""

import importlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from service.tracing import outgoing

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = importlib.import_module("worker.tasks")
    monkeypatch.setattr(module, "_HEARTBEAT_S", 0.001)
    yield module
    module._stopping.clear()


def test_the_heartbeat_outlives_a_redis_that_is_away(tasks: ModuleType) -> None:
    heard: list[str] = []

    def beat(_: str) -> None:
        heard.append("beat")
        if len(heard) == 1:
            raise RedisConnectionError
        tasks._stopping.set()

    runs = SimpleNamespace(beat=beat, leave=lambda _: heard.append("left"))
    tasks._beat(SimpleNamespace(runs=runs))
    assert heard == ["beat", "beat", "left"]


@pytest.mark.parametrize("error", [RedisConnectionError("loading"), RuntimeError("out of memory"), OSError("no file")])
def test_a_worker_that_cannot_load_ends(error: Exception, tasks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(tasks.Stores, "connect", lambda _, **__: None)
    monkeypatch.setattr(tasks, "_trainer", fail)
    with pytest.raises(SystemExit):
        tasks.load()


def test_a_run_goes_on_with_the_trace_of_its_message(tasks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    trainer = SimpleNamespace(execute=lambda _: told.append(outgoing()["traceparent"]))
    monkeypatch.setattr(tasks, "_trainers", [trainer])
    tasks.run.push_request(traceparent=TRACE)
    try:
        tasks.run.run("run_1")
    finally:
        tasks.run.pop_request()
    assert told == [TRACE]
