"""The stack under test, seen from outside and, for the faults, from inside: its processes, stores and files."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import httpx
import psutil

from service.client import ClientError, ErrataClient
from service.nodes import authorization
from service.queue import TaskQueue, create_celery
from service.schemas import Run, RunStatus
from service.stores import Stores
from tests.chaos.checker import Judge
from tests.chaos.notes import Notes
from tests.chaos.traffic import Ledger
from tests.chaos.truth import Truth
from tests.e2e.running_stack import RunningStack

LEASE_S = 8.0
AT_ONCE = 16
SETTINGS = {
    "ERRATA_RUN_LEASE_S": f"{LEASE_S:g}",
    # Faults cost edits their attempts and runs their patience; neither is what is tested.
    "ERRATA_MAX_ATTEMPTS": "50",
    "ERRATA_RETRY_WAIT_S": "1",
    "ERRATA_GATEWAY_MAX_ANSWERS": str(AT_ONCE),
    "ERRATA_NODE_CHECK_S": "5",
    "ERRATA_MAX_MODEL_LEN": "256",
    "ERRATA_EDIT_MAX_TOKENS": "64",
    "ERRATA_TRAIN_PRESERVE": "0",
    "ERRATA_EVALUATE_SAMPLE": "2",
    "ERRATA_VERIFY_SAMPLE": "2",
}
"""A stack that learns in seconds and has bounds that a test can reach."""

# On two quiet cores seconds; a node that starts while others have the cores takes minutes.
PATIENCE_S = 400.0


class WithoutEffectError(Exception):
    """A fault did not do what it is there for."""


class World:
    """One running stack, what was said to it and what is known of it."""

    def __init__(self, running: RunningStack, random: Random) -> None:
        self.running = running
        self.settings = running.stack.settings()
        self.url = running.url
        self.stores = Stores.connect(self.settings)
        self.celery = create_celery(self.settings)
        self.queue = TaskQueue(self.celery, self.stores.redis)
        self.versions = Path(self.settings.store_url)
        self.cache = self.settings.home / "node-cache"
        self.notes = Notes()
        self.ledger = Ledger(self.client, self.notes, random)
        self.truth = Truth()
        self.judge = Judge(self.truth, self.notes)

    def client(self, timeout_s: float = 60) -> ErrataClient:
        """A client; one for each thread."""
        return ErrataClient(self.url, timeout_s=timeout_s)

    def http(self) -> httpx.Client:
        """What speaks to the gateway as any program does."""
        return httpx.Client(base_url=self.url, timeout=60)

    def close(self) -> None:
        self.stores.redis.close()
        self.celery.close()

    def pid(self, name: str) -> int:
        """The process id of one of the stack's processes, once it has one."""
        found: list[int] = []

        def has_one() -> bool:
            found[:] = [process.pid for process in self.running.stack.processes() if process.name == name]
            return bool(found and found[0] and psutil.pid_exists(found[0]))

        until(has_one, what=f"{name} has a process")
        return found[0]

    def signal(self, name: str, number: signal.Signals, *, group: bool = False) -> None:
        """Sends a signal to a process, or to its whole group."""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid(name), number)

    def answers(self) -> bool:
        """Whether the stack is ready and a user gets an answer."""
        try:
            with self.client(10) as client:
                return client.health().ready and client.ask("The", max_tokens=1).version >= 0
        except ClientError:
            return False

    def until_answers(self) -> None:
        until(self.answers, what="the stack answers")

    def recorded(self) -> list[int]:
        """Versions with edits whose truth is known."""
        return sorted(set(self.truth.known()) - {0})

    def forget(self, version: int) -> None:
        """The node forgets a version, and loads and verifies it again when it is asked for."""
        path = f"{self.settings.nodes[0]}/errata/versions/{version}"
        httpx.delete(path, headers=authorization(self.settings.node_token.get_secret_value()), timeout=60)

    def training(self) -> Run:
        """A run that has not come far, over an edit that is submitted for it."""
        self.ledger.submit(within_s=PATIENCE_S)
        found: list[Run] = []

        def trains() -> bool:
            run = self.stores.runs.current()
            found[:] = [run] if run and run.status is RunStatus.TRAINING and run.phase in {"claim", "train"} else []
            return bool(found)

        until(trains, what="a run trains")
        return found[0]

    def until_a_run_fails(self, since: Run) -> None:
        """Waits until a run fails, this one or one behind it."""

        def failed() -> bool:
            runs = self.stores.runs.page(after=None, limit=20).data
            return any(run.status is RunStatus.FAILED and (run.token or 0) >= (since.token or 0) for run in runs)

        until(failed, what="a run fails")

    def left_behind(self) -> list[str]:
        """Processes of this stack that are there."""
        return [
            f"{process.pid} {process.name()}"
            for process in psutil.process_iter()
            if _is_of(process, self.settings.home)
        ]


@contextmanager
def world_of_its_own(home: Path, random: Random) -> Iterator[World]:
    """A stack that is started in this home, and stopped; nothing of it may stay behind."""
    running = RunningStack(home, SETTINGS)
    try:
        running.up()
        world = World(running, random)
        try:
            yield world
        finally:
            world.close()
    finally:
        running.down()
    assert not (left := world.left_behind()), f"left behind by a stack that was stopped: {left}"


def until(condition: Callable[[], bool], *, what: str, within_s: float = PATIENCE_S) -> None:
    """Waits for a condition.

    Raises:
        WithoutEffectError: it does not come about.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise WithoutEffectError(f"not within {within_s:g} s: {what}")
        time.sleep(0.2)


def _is_of(process: psutil.Process, home: Path) -> bool:
    try:
        environment: dict[str, str] = process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return environment.get("ERRATA_HOME") == str(home)
