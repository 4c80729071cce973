"""However often a task comes and however long a worker sleeps: one run commits for an edit set, a number comes once."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import MakeReconciler
from scripted_node import ScriptedNode
from scripted_worker import ScriptedWorker, fact
from training_bench import Bench

from service.reconcile import Reconciler
from service.runs import LeaseLostError, RunCancelledError
from service.schemas import EditStatus, EpochLoss, Run, RunStatus, Trigger, VersionRecord
from service.stores import Stores


class Sleeper:
    """Puts the worker to sleep before one of its calls; meanwhile its run is taken over and another carried out."""

    def __init__(self, bench: Bench, reconciler: Reconciler) -> None:
        self.bench = bench
        self.reconciler = reconciler
        self.other: Run | None = None
        self.slept = False

    def before(self, monkeypatch: pytest.MonkeyPatch, owner: object, method: str) -> None:
        real = getattr(owner, method)

        def late(*args: Any, **kwargs: Any) -> Any:
            self.sleep()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, method, late)

    def sleep(self) -> None:
        if self.slept:
            return
        self.slept = True
        self.bench.stores.redis.delete("errata:runs:lease")
        self.reconciler.tick()
        self.other = self.bench.run()


@pytest.fixture
def sleeper(bench: Bench, make_reconciler: MakeReconciler, node: ScriptedNode) -> Sleeper:
    return Sleeper(bench, make_reconciler(node.client()))


def registered(bench: Bench) -> list[int]:
    return [record.version for record in bench.stores.registry.all()]


@pytest.mark.parametrize("moment", ["claim", "update", "epoch", "next_number", "write", "commit"])
def test_a_worker_that_slept_past_its_lease_changes_nothing(
    bench: Bench, sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    stores = bench.stores
    edit = bench.submit("one", "uno")
    if moment == "epoch":
        bench.between_epochs = lambda epoch: sleeper.sleep() if epoch.epoch == 2 else None
    else:
        owners = {"claim": stores.edits, "update": stores.runs, "write": bench.trainer.versions}
        sleeper.before(monkeypatch, owners.get(moment, stores.registry), moment)
    late = bench.run()
    assert sleeper.other is not None
    assert sleeper.other.status is RunStatus.SUCCEEDED
    assert late.error is not None
    assert (late.status, late.error.code, late.version) == (RunStatus.FAILED, "worker_lost", None)
    assert late.phase == ""
    if moment == "epoch":
        assert len(late.epochs) == 2
    version = sleeper.other.version
    assert version == (2 if moment in {"write", "commit"} else 1), "no number comes twice"
    assert registered(bench) == [version, 0]
    written = [0, 1, 2] if moment in {"write", "commit"} else [0, 1]
    assert bench.trainer.versions.versions() == written
    found = stores.edits.get(edit)
    assert (found.status, found.version) == (EditStatus.LIVE, version)
    assert stores.runs.current() is None


@pytest.mark.parametrize("end", ["fails", "is cancelled"])
def test_a_worker_that_slept_gives_back_nothing_of_the_other_run(
    bench: Bench, sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    stores = bench.stores
    edit = bench.submit("one", "uno")
    sleeper.before(monkeypatch, stores.runs, "give_up")

    def stop(_: object) -> None:
        if not bench.trainer.stopping.is_set() and len(bench.starts) == 1:
            if end == "fails":
                raise OSError("disk full")
            bench.trainer.stopping.set()

    def other() -> Run:
        bench.trainer.stopping.clear()
        return run()

    bench.between_epochs = stop
    run = bench.run
    monkeypatch.setattr(bench, "run", other)
    late = run()
    assert late.error is not None
    assert late.error.code == "worker_lost"
    found = stores.edits.get(edit)
    assert (found.status, found.version, found.attempts) == (EditStatus.LIVE, 1, 2)


def test_an_empty_set_is_not_handed_over_by_a_worker_that_slept(
    bench: Bench, sleeper: Sleeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = bench.submit("one", "uno")
    bench.run()
    bench.stores.edits.retract(edit)
    sleeper.before(monkeypatch, bench.stores.runs, "hand_over")
    late = bench.run()
    assert late.error is not None
    assert (late.status, late.version) == (RunStatus.FAILED, None)
    assert sleeper.other is not None
    assert sleeper.other.status is RunStatus.SUCCEEDED
    assert bench.stores.edits.get(edit).status is EditStatus.RETRACTED


def test_a_worker_that_slept_and_committed_in_time_is_not_taken_over(
    bench: Bench, make_reconciler: MakeReconciler, node: ScriptedNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reconciler has seen that nobody renews the lease; the worker wakes up and commits before it is ended."""
    stores = bench.stores
    edit = bench.submit("one", "uno")
    give_up = stores.runs.give_up
    deciding, committed = threading.Event(), threading.Event()
    node.ready = False  # so that the look does not go on to verify what it does not take over

    def late(run: Run, status: RunStatus, **how: Any) -> None:
        deciding.set()
        assert committed.wait(20)
        give_up(run, status, **how)

    reconciler = make_reconciler(node.client())
    with ThreadPoolExecutor(1) as pool:

        def look(_: object) -> None:
            if not deciding.is_set():
                monkeypatch.setattr(stores.runs, "give_up", late)
                stores.redis.delete("errata:runs:lease")
                looks.append(pool.submit(reconciler.tick))
                assert deciding.wait(20)

        looks: list[Any] = []
        bench.between_epochs = look
        run_id = stores.runs.request(Trigger.MANUAL)[0].id
        bench.trainer.execute(run_id)
        committed.set()
        looks[0].result()
    run = stores.runs.get(run_id)
    assert (run.status, run.version) == (RunStatus.VERIFYING, 1)
    assert stores.edits.get(edit).status is EditStatus.TRAINED


def test_a_task_that_is_delivered_again_does_nothing(bench: Bench) -> None:
    bench.submit("one", "uno")
    run_id = bench.stores.runs.request(Trigger.MANUAL)[0].id
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: bench.trainer.execute(run_id), range(8)))
    bench.trainer.execute(run_id)
    assert len(bench.starts) == 1
    assert registered(bench) == [1, 0]
    assert bench.stores.runs.get(run_id).status is RunStatus.VERIFYING


def test_a_task_that_is_delivered_behind_its_run_does_nothing(bench: Bench) -> None:
    bench.submit("one", "uno")
    run = bench.run()
    bench.submit("two", "dos")
    bench.trainer.execute(run.id)
    assert len(bench.starts) == 1
    assert bench.stores.runs.get(run.id) == run


def test_what_fails_behind_the_commit_does_not_undo_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = bench.submit("one", "uno")

    def fail(_: str) -> None:
        raise ValueError("no message")

    monkeypatch.setattr(bench.trainer.queue, "publish", fail)
    run_id = bench.stores.runs.request(Trigger.MANUAL)[0].id
    bench.trainer.execute(run_id)
    assert bench.stores.runs.get(run_id).status is RunStatus.VERIFYING
    assert bench.stores.edits.get(edit).status is EditStatus.TRAINED


def test_of_two_train_workers_one_trains(bench: Bench) -> None:
    bench.submit("one", "uno")
    seen: list[RunStatus] = []

    def another(_: object) -> None:
        if not seen:
            waiting = bench.stores.runs.request(Trigger.MANUAL)[0].id
            bench.trainer.execute(waiting)
            seen.append(bench.stores.runs.get(waiting).status)

    bench.between_epochs = another
    assert bench.run().status is RunStatus.SUCCEEDED
    assert seen == [RunStatus.QUEUED]
    assert len(bench.starts) == 1


def test_a_counter_that_was_lost_gives_no_number_again(bench: Bench) -> None:
    bench.submit("one", "uno")
    bench.run()
    bench.stores.redis.delete("errata:versions:seq")
    bench.submit("two", "dos")
    assert bench.run().version == 2


def test_a_withdrawn_edit_of_a_run_that_was_only_ended_goes(
    stores: Stores, worker: ScriptedWorker, reconciler: Reconciler
) -> None:
    [edit] = stores.edits.submit([fact("a", "1")])
    run, _ = worker.begin()
    stores.edits.retract(edit.id)
    assert stores.edits.get(edit.id).status is EditStatus.RETRACTING
    stores.runs.finish(run.id, RunStatus.FAILED)
    reconciler.tick()
    assert stores.edits.get(edit.id).status is EditStatus.RETRACTED
    assert stores.runs.idle()


@pytest.mark.parametrize("step", ["commit", "hand_over"])
def test_a_cancel_before_the_last_step_is_in_time(
    stores: Stores, worker: ScriptedWorker, reconciler: Reconciler, step: str
) -> None:
    """The worker has looked for the last time whether somebody cancelled its run."""
    [edit] = stores.edits.submit([fact("a", "1")])
    run, members = worker.begin()
    [later] = stores.edits.submit([fact("b", "2")])
    stores.runs.cancel(run.id)
    with pytest.raises(RunCancelledError):
        worker.commit(run, members) if step == "commit" else stores.runs.hand_over(run, 0)
    assert stores.runs.get(run.id).status is RunStatus.TRAINING
    assert [record.version for record in stores.registry.all()] == [0]
    stores.runs.give_up(run, RunStatus.CANCELLED, refund=True)
    reconciler.tick()
    assert not stores.runs.idle(), "the triggers wait for news"
    statuses = [stores.edits.get(one.id).status for one in (edit, later)]
    assert statuses == [EditStatus.QUEUED, EditStatus.QUEUED]


def test_a_worker_is_told_of_a_cancel_at_its_commit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = bench.submit("one", "uno")
    commit = bench.stores.registry.commit

    def late(record: VersionRecord, *args: Any, **how: Any) -> None:
        assert record.run is not None
        bench.stores.runs.cancel(record.run)
        commit(record, *args, **how)

    monkeypatch.setattr(bench.stores.registry, "commit", late)
    assert bench.run().status is RunStatus.CANCELLED
    found = bench.stores.edits.get(edit)
    assert (found.status, found.attempts) == (EditStatus.QUEUED, 0)


def test_edits_that_an_ended_run_did_not_give_back_are_queued_again(
    stores: Stores, worker: ScriptedWorker, reconciler: Reconciler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever ended the run died before it gave its edits back."""
    [edit] = stores.edits.submit([fact("a", "1")])
    run, _ = worker.begin()
    stores.runs.finish(run.id, RunStatus.FAILED)
    reconciler.tick()
    assert stores.edits.get(edit.id).status is EditStatus.QUEUED


Say = Callable[[Stores, Run], object]


@pytest.mark.parametrize(
    "say",
    [
        lambda stores, run: stores.runs.update(run, phase="train"),
        lambda stores, run: stores.runs.add_timing(run, "train", 1.0),
        lambda stores, run: stores.runs.add_epoch(run, EpochLoss(epoch=1, loss=1.0, steps=1, seconds=1.0), eta_s=None),
        lambda stores, run: stores.runs.hand_over(run, 0),
        lambda stores, run: stores.runs.give_up(run, RunStatus.CANCELLED),
        lambda stores, run: stores.runs.renew(run),
        lambda stores, run: stores.edits.claim(run.id),
    ],
)
def test_nothing_that_an_old_worker_says_is_heard(stores: Stores, worker: ScriptedWorker, say: Say) -> None:
    old, _ = worker.begin()
    stores.runs.finish(old.id, RunStatus.FAILED)
    new, _ = worker.begin()
    before = [stores.runs.get(run.id) for run in (old, new)]
    with pytest.raises(LeaseLostError):
        say(stores, old)
    assert [stores.runs.get(run.id) for run in (old, new)] == before


def test_epochs_told_twice_or_by_two_are_kept_once(stores: Stores, worker: ScriptedWorker) -> None:
    run, _ = worker.begin()
    losses = [EpochLoss(epoch=number, loss=1 / number, steps=3, seconds=0.1) for number in range(1, 13)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda loss: stores.runs.add_epoch(run, loss, eta_s=1.0), losses * 3))
        list(pool.map(lambda phase: stores.runs.add_timing(run, phase, 0.5), ["train", "commit", "evaluate"]))
    found = stores.runs.get(run.id)
    assert found.epochs == losses
    assert found.timings == {"train": 0.5, "commit": 0.5, "evaluate": 0.5}
