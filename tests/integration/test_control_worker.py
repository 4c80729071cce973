"""The control worker as a process: Celery, its beat and the solo pool between a real Redis and a real HTTP node."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from redis_server import RedisServer
from scripted_node import ScriptedNode, listening
from scripted_worker import ScriptedWorker, fact
from waiting import until

from service.audit import Actor, acting
from service.queue import TRAIN_QUEUE, TaskQueue
from service.schemas import EditStatus, RunStatus
from service.stores import Stores

pytestmark = pytest.mark.timeout(90)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def process(
    redis_server: RedisServer, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, tmp_path: Path
) -> Iterator[subprocess.Popen[str]]:
    with listening(node) as address, (tmp_path / "log").open("w+") as log:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ERRATA_")}
        environment |= {"ERRATA_REDIS_URL": redis_server.url, "ERRATA_NODES": address, "ERRATA_RETRY_WAIT_S": "0"}
        started = subprocess.Popen(
            [
                *(sys.executable, "-m", "celery", "-A", "service.control", "worker", "-Q", "control"),
                *("--pool", "solo", "-B", "-s", str(tmp_path / "beat"), "--loglevel", "INFO"),
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            yield started
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait(10)


def test_beat_ticks_publications_run_and_sigterm_ends_it(
    process: subprocess.Popen[str],
    stores: Stores,
    queue: TaskQueue,
    worker: ScriptedWorker,
    node: ScriptedNode,
    tmp_path: Path,
) -> None:
    with acting(Actor(request_id="from-afar")):
        [first] = stores.edits.submit([fact("a", "1")])
    until(lambda: stores.runs.queued() is not None)
    until(lambda: stores.redis.llen(TRAIN_QUEUE) == 1)
    run, version = worker.train()
    first_run = run.id
    queue.publish(run.id)
    until(lambda: stores.runs.get(run.id).status is RunStatus.SUCCEEDED)
    assert stores.edits.get(first.id).status is EditStatus.LIVE

    [second] = stores.edits.submit([fact("b", "2")])
    run, _ = worker.train()
    until(lambda: stores.runs.get(run.id).status is RunStatus.SUCCEEDED)
    assert stores.edits.get(second.id).status is EditStatus.LIVE, "the tick publishes without a message"

    node.resident.clear()
    until(lambda: version + 1 in node.resident)

    process.terminate()
    assert process.wait(15) == 0
    log = (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    activated = next(line for line in lines if line["event"] == "version.activated")
    assert (activated["run"], activated["version"]) == (first_run, version)
    assert activated["origins"] == [{"edit": first.id, "request_id": "from-afar"}]
    assert {line["run"] for line in lines if line["event"] == "run.ended"} == {first_run, run.id}
    assert "Traceback" not in log
    until(lambda: not group_lives(process.pid), within_s=5)


def test_a_worker_that_is_killed_leaves_no_beat_behind(process: subprocess.Popen[str], stores: Stores) -> None:
    stores.edits.submit([fact("a", "1")])
    until(lambda: stores.runs.queued() is not None)
    assert psutil.Process(process.pid).children(), "beat is a process of its own"
    process.kill()
    process.wait(10)
    until(lambda: not group_lives(process.pid), within_s=10)
