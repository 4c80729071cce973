"""A command that Redis has carried out and whose answer was lost is sent again: it must be as if it had come once."""

from collections.abc import Callable

import pytest
from redis.connection import Connection
from redis.exceptions import ConnectionError as LostConnectionError
from scripted_worker import ScriptedWorker, fact, record

from service.api_keys import Scope
from service.reconcile import Reconciler
from service.runs import LeaseLostError
from service.schemas import Edit, EditError, EditStatus, Run, RunStatus, VersionState
from service.stores import Stores

LoseNext = Callable[[], list[object]]


@pytest.fixture
def lose_next(monkeypatch: pytest.MonkeyPatch) -> LoseNext:
    """Loses the next answer of a script that was carried out; it is in the list that is returned."""

    def arm() -> list[object]:
        lost: list[object] = []
        read = Connection.read_response

        def late(self: Connection, *args: object, **options: object) -> object:
            answer = read(self, *args, **options)
            # What a script answers that has nothing to tell.
            if lost or answer != "{}":
                return answer
            lost.append(answer)
            self.disconnect()
            raise LostConnectionError("the answer was lost")

        monkeypatch.setattr(Connection, "read_response", late)
        return lost

    return arm


def last_attempt(stores: Stores, worker: ScriptedWorker) -> tuple[Edit, Run]:
    """An edit in its run, which is the last that may try it."""
    [edit] = stores.edits.submit([fact("a", "1")])
    for _ in range(2):
        run, _ = worker.begin()
        stores.runs.give_up(run, RunStatus.FAILED, error=EditError(code="training_failed", message="no"))
    run, _ = worker.begin()
    assert stores.edits.get(edit.id).attempts == 3
    return edit, run


def test_a_run_that_is_cancelled_costs_its_edits_no_attempt(
    stores: Stores, worker: ScriptedWorker, reconciler: Reconciler, lose_next: LoseNext
) -> None:
    edit, run = last_attempt(stores, worker)
    lost = lose_next()
    with pytest.raises(LeaseLostError):
        stores.runs.give_up(run, RunStatus.CANCELLED, refund=True)
    assert lost == ["{}"]
    reconciler.tick()
    found = stores.edits.get(edit.id)
    assert (found.status, found.attempts) == (EditStatus.QUEUED, 2)


def test_a_run_that_fails_says_why(
    stores: Stores, worker: ScriptedWorker, reconciler: Reconciler, lose_next: LoseNext
) -> None:
    edit, run = last_attempt(stores, worker)
    lost = lose_next()
    with pytest.raises(LeaseLostError):
        stores.runs.give_up(run, RunStatus.FAILED, error=EditError(code="gate_rejected", message="no"))
    assert lost == ["{}"]
    reconciler.tick()
    found = stores.edits.get(edit.id)
    assert found.error is not None
    assert (found.status, found.error.code) == (EditStatus.FAILED, "gate_rejected")


def test_a_run_that_is_taken_over_lets_a_withdrawn_edit_go(
    stores: Stores, worker: ScriptedWorker, reconciler: Reconciler, lose_next: LoseNext
) -> None:
    [edit] = stores.edits.submit([fact("a", "1")])
    run, _ = worker.begin()
    stores.edits.retract(edit.id)
    stores.redis.delete("errata:runs:lease")
    give_up, lost = stores.runs.give_up, []

    def late(*args: object, **how: object) -> None:
        lost.append(lose_next())
        give_up(*args, **how)

    stores.runs.__dict__["give_up"] = late
    reconciler.tick()
    assert lost == [["{}"]]
    assert stores.runs.get(run.id).status is RunStatus.FAILED
    assert stores.edits.get(edit.id).status is EditStatus.RETRACTED


def test_a_version_is_committed_once_and_what_came_of_it_stands(stores: Stores, worker: ScriptedWorker) -> None:
    [edit] = stores.edits.submit([fact("a", "1")])
    run, _ = worker.begin()
    version = stores.registry.next_number(run, above=0)
    said = record(version, run=run.id)
    for state in (VersionState.COMMITTED, VersionState.VERIFIED, VersionState.REJECTED):
        stores.registry.commit(said, [edit.id], token=run.token)
        if state is not VersionState.COMMITTED:
            stores.registry.mark(version, state)
            stores.registry.commit(said, [edit.id], token=run.token)
        assert stores.registry.get(version).state is state
    assert stores.runs.get(run.id).status is RunStatus.VERIFYING


def test_a_version_that_a_repair_registered_is_handed_over_by_its_run(stores: Stores, worker: ScriptedWorker) -> None:
    [edit] = stores.edits.submit([fact("a", "1")])
    run, _ = worker.begin()
    version = stores.registry.next_number(run, above=0)
    found = record(version, run=run.id).model_copy(update={"reason": "it was found in the store"})
    stores.registry.commit(found, [edit.id], token=None)
    stores.registry.commit(record(version, run=run.id), [edit.id], token=run.token)
    assert stores.runs.get(run.id).status is RunStatus.VERIFYING
    assert stores.edits.get(edit.id).status is EditStatus.TRAINED


def test_the_pointer_is_where_the_caller_wants_it(
    stores: Stores, worker: ScriptedWorker, reconciler: Reconciler, lose_next: LoseNext
) -> None:
    stores.edits.submit([fact("a", "1")])
    run, version = worker.train()
    reconciler.publish(run.id)
    lost = lose_next()
    moved = stores.registry.activate(0, expected_active=version)
    assert lost == ["{}"]
    assert (moved.active, moved.previous) == (0, version)


def test_a_key_is_listed_once(stores: Stores, lose_next: LoseNext) -> None:
    lost = lose_next()
    stores.keys.create("ci", [Scope.READ])
    assert lost == ["{}"]
    assert len(stores.keys.all()) == 1
    assert [entry.action for entry in stores.audit.page(after=None, limit=10).data] == ["key.created"]
