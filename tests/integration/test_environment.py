"""What fails around a run, for real: the store, its disk, Redis. The run fails or waits; the rest goes on."""

import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from redis_server import RedisServer
from scripted_node import ScriptedNode
from scripted_worker import ScriptedWorker, fact
from training_bench import Bench, make_bench

from service.nodes import NodeClient
from service.queue import TaskQueue
from service.reconcile import Reconciler
from service.schemas import EditStatus, RunStatus, Trigger
from service.settings import Settings
from service.stores import Stores
from worker.training.snapshot import EpochReport


@pytest.fixture
def file_limit() -> Iterator[None]:
    """What comes when an epoch has ended can write no file of more than a few bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_ends_the_run_and_nothing_else(bench: Bench, file_limit: None) -> None:
    old = bench.submit("old", "yes")
    bench.run()
    new = bench.submit("new", "yes")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    bench.between_epochs = lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    run = bench.run()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert run.error is not None
    assert (run.status, run.error.code) == (RunStatus.FAILED, "training_failed")
    assert "version 2 could not be written: [Errno 27] File too large" in run.error.message
    edits = bench.stores.edits.get_many([old, new])
    assert [(edit.status.value, edit.attempts) for edit in edits] == [("live", 1), ("queued", 1)]
    assert bench.trainer.versions.versions() == [0, 1]
    bench.between_epochs = lambda _: None
    again = bench.run()
    assert (again.status, again.version) == (RunStatus.SUCCEEDED, 3)


@pytest.mark.parametrize("method", ["ls", "info", "write"])
def test_a_store_that_is_away_ends_the_run_and_nothing_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    edit = bench.submit("new", "yes")

    class DriverError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise DriverError("endpoint not reached")

    with monkeypatch.context() as patch:
        if method in {"ls", "info"}:
            patch.setattr(bench.trainer.versions._fs, method, fail)
        else:
            patch.setattr("worker.delta.write_folder", fail)
        run = bench.run()
    assert run.error is not None
    assert run.error.message.startswith("StoreUnavailableError: ")
    assert run.error.message.endswith(": endpoint not reached")
    assert bench.stores.edits.get(edit).status is EditStatus.QUEUED
    assert bench.run().status is RunStatus.SUCCEEDED


def test_a_snapshot_that_cannot_be_removed_does_not_keep_the_edits(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = bench.submit("new", "yes")

    def fail(*_: object, **__: object) -> None:
        raise OSError("read-only")

    def fail_both(_: EpochReport) -> None:
        monkeypatch.setattr(Path, "unlink", fail)
        raise OSError("read-only")

    bench.between_epochs = fail_both
    assert bench.run().status is RunStatus.FAILED
    assert bench.stores.edits.get(edit).status is EditStatus.QUEUED


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    folder = tmp_path / "redis"
    folder.mkdir()
    server = RedisServer(folder)
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize("retries", [5, 35])
def test_a_redis_that_restarts_costs_no_attempt(
    own_redis: RedisServer,
    settings: Settings,
    queue: TaskQueue,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    retries: int,
) -> None:
    here = settings.model_copy(update={"redis_url": own_redis.url, "run_lease_s": 1.0})
    stores = Stores.connect(here, retries=retries)
    monkeypatch.setattr(queue, "publish", lambda _: None)
    bench = make_bench(stores, queue, here, tmp_path, monkeypatch)
    edit = bench.submit("new", "yes")
    back: list[threading.Timer] = []

    def restart(epoch: EpochReport) -> None:
        if epoch.epoch == 2 and not back:
            own_redis.kill()
            back.append(threading.Timer(4.0, own_redis.start))
            back[0].start()

    bench.between_epochs = restart
    run_id = stores.runs.request(Trigger.MANUAL)[0].id
    bench.trainer.execute(run_id)
    back[0].join()
    patient = Stores.connect(here, retries=35)
    run = patient.runs.get(run_id)
    if retries > 5:
        assert (run.status, run.version) == (RunStatus.VERIFYING, 1)
        assert [epoch.epoch for epoch in run.epochs] == list(range(1, len(run.epochs) + 1))
    else:
        assert run.status is RunStatus.TRAINING, "nobody could be told; it is taken over"
    found = patient.edits.get(edit)
    assert (found.status is EditStatus.TRAINED, found.attempts) == (retries > 5, 1)
    patient.redis.close()
    stores.redis.close()


def test_a_node_that_hangs_does_not_keep_a_dead_workers_run(
    stores: Stores, queue: TaskQueue, settings: Settings, worker: ScriptedWorker, node: ScriptedNode
) -> None:
    now = [1000.0]

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return httpx.Response(200)
        now[0] += settings.run_lease_s
        raise httpx.ReadTimeout("silent", request=request)

    client = NodeClient("http://node", token="t", timeout_s=5, transport=httpx.MockTransport(handle))
    reconciler = Reconciler(stores, [client], queue, settings, clock=lambda: now[0])
    [edit] = stores.edits.submit([fact("a", "1")])
    run, _ = worker.begin()
    reconciler.tick()
    stores.redis.delete("errata:runs:lease")
    now[0] += 2
    reconciler.tick()
    assert stores.runs.get(run.id).status is RunStatus.FAILED
    assert stores.edits.get(edit.id).status is EditStatus.QUEUED


def test_a_run_is_not_taken_over_at_the_first_look_after_redis_was_away(
    stores: Stores, queue: TaskQueue, settings: Settings, worker: ScriptedWorker, node: ScriptedNode
) -> None:
    now = [1000.0]
    reconciler = Reconciler(stores, [node.client()], queue, settings, clock=lambda: now[0])
    stores.edits.submit([fact("a", "1")])
    run, _ = worker.begin()
    stores.redis.delete("errata:runs:lease")
    now[0] += settings.run_lease_s
    reconciler.tick()
    assert stores.runs.get(run.id).status is RunStatus.TRAINING
    assert stores.runs.renew(run) is False
    now[0] += 2
    reconciler.tick()
    assert stores.runs.get(run.id).status is RunStatus.TRAINING
    stores.redis.delete("errata:runs:lease")
    reconciler.tick()
    assert stores.runs.get(run.id).status is RunStatus.FAILED
