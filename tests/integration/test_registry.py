"""VersionRegistry against a real Redis: numbers, edit sets, and one pointer."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from scripted_worker import ScriptedWorker, fact, record

from service.errors import ConflictError, NotFoundError
from service.registry import FencedError, NotVerifiedError, OvertakenError
from service.runs import LeaseLostError
from service.schemas import EditStatus, Run, RunStatus, Trigger, VersionState
from service.stores import Stores


def commit(stores: Stores, version: int, members: list[str]) -> None:
    stores.registry.commit(record(version, state=VersionState.VERIFIED), members, token=None)


def test_numbers_are_never_given_twice(stores: Stores, worker: ScriptedWorker) -> None:
    run, _ = worker.begin()
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: stores.registry.next_number(run, above=0), range(100)))
    assert sorted(numbers) == list(range(1, 101))
    assert stores.registry.next_number(run, above=500) == 501
    assert stores.registry.next_number(run, above=7) == 502


def under_way(stores: Stores, *, epoch: int) -> Run:
    """The run under way, as if it had begun when the pointer had moved so often."""
    run = stores.runs.start(stores.runs.request(Trigger.MANUAL)[0].id)
    assert run is not None
    return run.model_copy(update={"epoch_of_activation": epoch})


def test_a_committed_version_does_not_change(stores: Stores) -> None:
    edits = stores.edits.submit([fact("a", "1"), fact("b", "2")])
    commit(stores, 1, [edits[0].id])
    with pytest.raises(ConflictError) as taken:
        stores.registry.commit(record(1), [edits[1].id], token=None)
    assert taken.value.code == "version_exists"
    assert stores.registry.members(1) == [1]


def test_a_commit_whose_answer_was_lost_may_be_repeated(stores: Stores) -> None:
    [edit] = stores.edits.submit([fact("a", "1")])
    same = record(1)
    stores.registry.commit(same, [edit.id], token=None)
    stores.registry.commit(same, [edit.id], token=None)
    committed = [row for _, row in stores.redis.xrange("errata:events") if row["type"] == "version.committed"]
    assert len(committed) == 1


def test_a_stale_token_cannot_commit(stores: Stores, worker: ScriptedWorker) -> None:
    stores.edits.submit([fact("a", "1")])
    old, members = worker.begin()
    stores.runs.finish(old.id, RunStatus.FAILED)
    with pytest.raises(FencedError):
        worker.commit(old, members)
    new, _ = worker.begin()
    assert new.token is not None
    assert old.token is not None
    assert new.token > old.token
    with pytest.raises(FencedError):
        worker.commit(old, members)
    with pytest.raises(FencedError):
        stores.registry.commit(record(5, run=new.id), [], token=old.token)
    assert [found.version for found in stores.registry.page(after=None, limit=10)[0]] == [0]


def test_edit_sets_are_kept_found_and_compared(stores: Stores) -> None:
    edits = stores.edits.submit([fact(f"p{number}", "t") for number in range(70)])
    ids = [edit.id for edit in edits]
    commit(stores, 1, ids[:3])
    commit(stores, 2, [*ids[1:3], ids[69]])
    commit(stores, 3, [])
    assert [stores.registry.members(version) for version in (1, 2, 3)] == [[1, 2, 3], [2, 3, 70], []]
    assert stores.registry.containing(70) == [2]
    assert stores.registry.containing(2) == [1, 2]
    assert stores.registry.containing(5) == []
    assert stores.registry.difference(1, 2) == ([1], [70])
    assert [edit.id for edit in stores.edits.by_sequence([1, 70])] == [ids[0], ids[69]]
    with pytest.raises(NotFoundError):
        stores.registry.difference(1, 99)


def test_pages_are_newest_first(stores: Stores) -> None:
    for version in range(12):
        commit(stores, version, [])
    records, more = stores.registry.page(after=None, limit=5)
    assert ([found.version for found in records], more) == ([11, 10, 9, 8, 7], True)
    records, more = stores.registry.page(after=5, limit=5)
    assert ([found.version for found in records], more) == ([4, 3, 2, 1, 0], False)


def test_activation_expects_what_the_caller_saw(stores: Stores) -> None:
    for version in range(3):
        commit(stores, version, [])
    with pytest.raises(OvertakenError):
        stores.registry.activate(1, expected_active=0)
    first = stores.registry.activate(0)
    assert (first.active, first.previous, first.epoch) == (0, None, 1)
    with pytest.raises(OvertakenError) as other:
        stores.registry.activate(2, expected_active=1)
    assert other.value.status == 409
    stores.registry.activate(1, expected_active=0)
    with pytest.raises(OvertakenError):
        stores.registry.activate(2, run=under_way(stores, epoch=first.epoch))
    with pytest.raises(NotFoundError):
        stores.registry.activate(9)
    now = stores.registry.active()
    assert now is not None
    assert (now.active, now.previous, now.epoch) == (1, 0, 2)


@pytest.mark.parametrize("state", [state for state in VersionState if state is not VersionState.VERIFIED])
def test_the_pointer_moves_only_to_what_is_verified(stores: Stores, state: VersionState) -> None:
    commit(stores, 0, [])
    before = stores.registry.activate(0)
    stores.registry.commit(record(1, state=state), [], token=None)
    with pytest.raises(NotVerifiedError, match=f"version 1 is {state}, not verified") as refused:
        stores.registry.activate(1)
    assert (refused.value.status, refused.value.code) == (409, "version_not_verified")
    assert stores.registry.active() == before


def test_moving_the_pointer_to_where_it_is_changes_nothing(stores: Stores) -> None:
    commit(stores, 0, [])
    commit(stores, 1, [])
    stores.registry.activate(0)
    moved = stores.registry.activate(1)
    assert stores.registry.activate(1) == moved
    ended = under_way(stores, epoch=moved.epoch - 1)
    stores.runs.finish(ended.id, RunStatus.SUCCEEDED)
    assert stores.registry.activate(1, run=ended) == moved, "a publication that is repeated"


def test_a_run_that_has_ended_neither_judges_its_version_nor_activates_it(stores: Stores) -> None:
    """Its publisher slept; another has judged the version."""
    commit(stores, 0, [])
    stores.registry.commit(record(1), [], token=None)
    active = stores.registry.activate(0)
    before = stores.registry.get(1)
    run = under_way(stores, epoch=1)
    stores.runs.finish(run.id, RunStatus.FAILED)
    under_way(stores, epoch=1)
    for judge in (
        lambda: stores.registry.mark_verified(1, run=run),
        lambda: stores.registry.reject(1, reason="2 of 3", run=run),
        lambda: stores.registry.activate(1, run=run),
    ):
        with pytest.raises(LeaseLostError):
            judge()
        assert stores.registry.get(1) == before
        assert stores.registry.active() == active


def test_what_is_rejected_is_not_verified(stores: Stores) -> None:
    """Another publisher of the run has found it wrong, and not ended the run yet."""
    commit(stores, 0, [])
    stores.registry.commit(record(1), [], token=None)
    stores.registry.activate(0)
    run = under_way(stores, epoch=1)
    stores.registry.reject(1, reason="2 of 3", run=run)
    with pytest.raises(LeaseLostError):
        stores.registry.mark_verified(1, run=run)
    assert stores.registry.get(1).state is VersionState.REJECTED


def test_what_is_missing_is_not_verified(stores: Stores) -> None:
    """A repair found its folder away while the nodes, which hold it, were asked."""
    commit(stores, 0, [])
    stores.registry.commit(record(1), [], token=None)
    run = under_way(stores, epoch=0)
    stores.registry.mark(1, VersionState.MISSING)
    with pytest.raises(LeaseLostError):
        stores.registry.mark_verified(1, run=run)
    assert stores.registry.get(1).state is VersionState.MISSING


def test_what_is_active_is_not_rejected(stores: Stores) -> None:
    """Another publisher of the run has moved the pointer, and not ended the run yet."""
    commit(stores, 0, [])
    commit(stores, 1, [])
    stores.registry.activate(0)
    run = under_way(stores, epoch=1)
    stores.registry.activate(1, run=run)
    with pytest.raises(LeaseLostError):
        stores.registry.reject(1, reason="2 of 3", run=run)
    assert stores.registry.get(1).state is VersionState.VERIFIED


def test_the_pointer_moves_once_under_concurrent_activations(stores: Stores) -> None:
    edits = stores.edits.submit([fact(f"p{version}", "t") for version in range(1, 9)])
    commit(stores, 0, [])
    for version, edit in enumerate(edits, start=1):
        commit(stores, version, [edit.id])
    stores.registry.activate(0)

    def activate(version: int) -> bool:
        try:
            stores.registry.activate(version, expected_active=0)
        except OvertakenError:
            return False
        stores.edits.settle()
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(activate, range(1, 9)))
    active = stores.registry.active()
    assert won.count(True) == 1
    assert active is not None
    assert (active.active, active.epoch) == (won.index(True) + 1, 2)


def test_settling_follows_the_pointer_whatever_the_order(stores: Stores, worker: ScriptedWorker) -> None:
    edits = stores.edits.submit([fact(f"p{number}", "t") for number in range(1, 7)])
    for version, edit in enumerate(edits, start=1):
        commit(stores, version, [edit.id])
        stores.edits.claim("run")
        stores.edits.move(edit.id, EditStatus.TRAINED, version=version)
        stores.redis.hset(f"errata:edit:{edit.id}", "verdict", "matched")

    def visit(version: int) -> None:
        stores.registry.activate(version)
        stores.edits.settle()

    for version in range(1, 7):
        visit(version)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(visit, [1, 2, 3, 4, 5, 6] * 5))
    active = stores.registry.active()
    assert active is not None
    assert [edit.id for edit in stores.edits.in_status(EditStatus.LIVE)] == [edits[active.active - 1].id]
    assert stores.edits.counts()[EditStatus.HELD] == 5


def test_marking_a_version_keeps_the_rest_of_its_record(stores: Stores) -> None:
    stores.registry.commit(record(1), [], token=None)
    stores.registry.mark(1, VersionState.REJECTED, reason="2 of 3")
    found = stores.registry.get(1)
    assert found == record(1).model_copy(
        update={"state": VersionState.REJECTED, "reason": "2 of 3", "created_at": found.created_at}
    )
    assert not stores.registry.shown(found).active
