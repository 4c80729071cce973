"""Trainer between a real Redis and a training that is only played: whatever ends a run, its edits are accounted for."""

import errno
import os
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lmdb
import pytest
import torch
from scripted_worker import ScriptedWorker, fact

from service.queue import TaskQueue
from service.schemas import Edit, EditStatus, Run, RunStatus, Trigger
from service.settings import Settings
from service.stores import Stores
from worker import run as worker_run
from worker.delta import StoreUnavailableError
from worker.evaluation.gate import GateDecision
from worker.run import Trainer
from worker.run_training import RunTraining
from worker.training.breadth_first import Hooks
from worker.training.encode import EncodingError
from worker.training.errors import TrainingCancelledError, TrainingError

Step = Callable[[], None]


def nothing() -> None:
    pass


@pytest.fixture
def execute_run(
    stores: Stores, worker: ScriptedWorker, queue: TaskQueue, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """Carries out a run over what is queued, with something that happens while it trains or while it is evaluated."""

    def run(*, training: Step = nothing, evaluating: Step = nothing, passed: bool = True, **changed: object) -> Run:
        def train(*_: Any, hooks: Hooks, **__: Any) -> SimpleNamespace:
            training()
            if hooks.should_stop():
                raise TrainingCancelledError
            return SimpleNamespace(tensors={})

        decision = GateDecision(passed=passed, reasons=() if passed else ("too bad",))
        monkeypatch.setattr(worker_run, "decide", lambda *_: decision)
        hasty = settings.model_copy(update={"run_lease_s": 0.2, **changed})
        played: Any = SimpleNamespace()
        base: Any = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(to_dict=dict)))
        workbench: Any = SimpleNamespace(base=base, train=train, evaluate=lambda *_: evaluating())
        run_training = RunTraining(workbench, played, stores, hasty)
        trainer = Trainer(workbench, run_training, played, stores, queue, hasty, threading.Event())
        monkeypatch.setattr(Trainer, "_commit", lambda self, run, *_: self.stores.runs.hand_over(run, 1))
        run_id = stores.runs.request(Trigger.MANUAL)[0].id
        trainer.execute(run_id)
        return stores.runs.get(run_id)

    return run


def submit(stores: Stores, *prompts: str) -> list[str]:
    return [edit.id for edit in stores.edits.submit([fact(prompt, "1") for prompt in prompts])]


def found(stores: Stores, ids: list[str]) -> list[tuple[str, int]]:
    edits: list[Edit] = stores.edits.get_many(ids)
    return [(edit.status.value, edit.attempts) for edit in edits]


@pytest.mark.parametrize("moment", ["training", "evaluating"])
def test_a_cancelled_run_gives_its_edits_back(
    stores: Stores, execute_run: Callable[..., Run], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = submit(stores, "a")
    heard = threading.Event()
    renew = stores.runs.renew

    def listen(run: Run) -> bool:
        if cancelled := renew(run):
            # Told behind the answer, which the lease has by the next renewal.
            threading.Timer(0.1, heard.set).start()
        return cancelled

    def cancel() -> None:
        run = stores.runs.current()
        assert run is not None
        stores.runs.cancel(run.id)
        assert heard.wait(5)

    monkeypatch.setattr(stores.runs, "renew", listen)
    assert execute_run(**{moment: cancel}).status is RunStatus.CANCELLED
    assert found(stores, ids) == [("queued", 0)]
    assert stores.runs.current() is None


@pytest.mark.parametrize(
    "error",
    [
        TrainingError("no result"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EROFS, os.strerror(errno.EROFS)),
        StoreUnavailableError("version 1 could not be written: endpoint not reached"),
        lmdb.DiskError("map"),
        KeyError("a mistake of ours"),
    ],
    ids=repr,
)
def test_a_run_that_fails_counts_an_attempt(stores: Stores, execute_run: Callable[..., Run], error: Exception) -> None:
    ids = submit(stores, "a")

    def fail() -> None:
        raise error

    ended = execute_run(training=fail)
    assert ended.status is RunStatus.FAILED
    assert ended.error is not None
    assert ended.error.code == "training_failed"
    assert ended.error.message == f"{type(error).__name__}: {error}".rstrip(": ")
    assert found(stores, ids) == [("queued", 1)]
    for attempt in (2, 3):
        assert execute_run(training=fail).status is RunStatus.FAILED
        assert found(stores, ids) == [("queued" if attempt == 2 else "failed", attempt)]
    [again] = submit(stores, "b")
    assert execute_run().status is RunStatus.VERIFYING, "the worker goes on"
    assert stores.edits.get(again).status is EditStatus.TRAINING


def test_a_run_that_takes_too_long_fails_and_says_so(stores: Stores, execute_run: Callable[..., Run]) -> None:
    ids = submit(stores, "a")
    ended = execute_run(training=lambda: time.sleep(0.05), run_max_s=0.01)
    assert ended.error is not None
    assert (ended.status, ended.error.code) == (RunStatus.FAILED, "run_too_long")
    assert found(stores, ids) == [("queued", 1)]


def test_a_version_that_the_gate_rejects_counts_an_attempt(stores: Stores, execute_run: Callable[..., Run]) -> None:
    ids = submit(stores, "a")
    ended = execute_run(passed=False)
    assert ended.error is not None
    assert (ended.error.code, ended.error.message) == ("gate_rejected", "too bad")
    assert found(stores, ids) == [("queued", 1)]


def test_an_edit_that_cannot_be_encoded_fails_alone(stores: Stores, execute_run: Callable[..., Run]) -> None:
    ids = submit(stores, "a", "b")

    def refuse() -> None:
        raise EncodingError(ids[0], "too long")

    assert execute_run(training=refuse).status is RunStatus.FAILED
    assert found(stores, ids) == [("failed", 1), ("queued", 0)]


def test_a_run_that_was_taken_over_changes_nothing(stores: Stores, execute_run: Callable[..., Run]) -> None:
    ids = submit(stores, "a")

    def take_over() -> None:
        run = stores.runs.current()
        assert run is not None
        stores.edits.unclaim(run.id)
        stores.runs.finish(run.id, RunStatus.FAILED)

    assert execute_run(evaluating=take_over).status is RunStatus.FAILED
    assert found(stores, ids) == [("queued", 1)]


def test_an_empty_edit_set_is_the_bases(stores: Stores, execute_run: Callable[..., Run]) -> None:
    ended = execute_run()
    assert (ended.status, ended.version) == (RunStatus.VERIFYING, 0)
