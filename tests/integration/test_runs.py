"""RunStore against a real Redis: one run at a time, and whoever lost it knows."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from scripted_worker import ScriptedWorker, fact

from service.errors import ConflictError, InvalidRequestError
from service.runs import LeaseLostError
from service.schemas import EditError, EpochLoss, Run, RunStatus, Trigger
from service.settings import Settings
from service.stores import Stores

ERROR = EditError(code="training_failed", message="no")


def test_who_asks_while_a_run_waits_gets_that_one(stores: Stores) -> None:
    with ThreadPoolExecutor(16) as pool:
        asked = list(pool.map(lambda _: stores.runs.request(Trigger.MANUAL), range(32)))
    assert len({run.id for run, _ in asked}) == 1
    assert [created for _, created in asked].count(True) == 1


def test_one_run_is_current_however_many_start(stores: Stores) -> None:
    first, _ = stores.runs.request(Trigger.MANUAL)
    with ThreadPoolExecutor(16) as pool:
        started = [run for run in pool.map(lambda _: stores.runs.start(first.id), range(32)) if run]
    assert [run.id for run in started] == [first.id]
    second, created = stores.runs.request(Trigger.MANUAL)
    assert created
    assert stores.runs.start(second.id) is None, "another is under way"
    assert stores.runs.queued() == second
    stores.runs.finish(first.id, RunStatus.SUCCEEDED)
    taken = stores.runs.start(second.id)
    assert taken is not None
    assert stores.runs.queued() is None
    assert stores.runs.current() == taken


def start(stores: Stores) -> Run:
    run = stores.runs.start(stores.runs.request(Trigger.MANUAL)[0].id)
    assert run is not None
    return run


def test_only_the_run_that_holds_the_lease_renews_it(stores: Stores) -> None:
    run = start(stores)
    assert stores.runs.leased()
    assert stores.runs.renew(run) is False
    stores.runs.finish(run.id, RunStatus.FAILED)
    assert not stores.runs.leased()
    with pytest.raises(LeaseLostError):
        stores.runs.renew(run)
    start(stores)
    with pytest.raises(LeaseLostError):
        stores.runs.renew(run)
    with pytest.raises(LeaseLostError):
        stores.runs.hand_over(run, 1)


def test_a_lease_that_is_not_renewed_expires(stores: Stores, settings: Settings) -> None:
    hasty = Stores.connect(settings.model_copy(update={"run_lease_s": 0.1}))
    run = start(hasty)
    time.sleep(0.15)
    assert not hasty.runs.leased()
    assert hasty.runs.current() == run
    hasty.redis.close()


def test_finishing_is_done_once(stores: Stores) -> None:
    run = start(stores)
    assert stores.runs.finish(run.id, RunStatus.FAILED, error=ERROR)
    assert not stores.runs.finish(run.id, RunStatus.SUCCEEDED)
    ended = stores.runs.get(run.id)
    assert (ended.status, ended.error) == (RunStatus.FAILED, ERROR)
    assert ended.finished_at is not None
    following = start(stores)
    assert not stores.runs.finish(run.id, RunStatus.SUCCEEDED)
    assert stores.runs.current() == following, "an ended run does not free another's place"
    types = [fields["type"] for _, fields in stores.redis.xrange("errata:events")]
    assert types == ["run.queued", "run.training", "run.failed", "run.queued", "run.training"]


def test_a_queued_run_is_cancelled_at_once(stores: Stores) -> None:
    run, _ = stores.runs.request(Trigger.IMMEDIATE)
    assert stores.runs.cancel(run.id).status is RunStatus.CANCELLED
    assert stores.runs.queued() is None
    assert stores.runs.start(run.id) is None
    assert not stores.runs.idle()
    with pytest.raises(ConflictError) as ended:
        stores.runs.cancel(run.id)
    assert ended.value.code == "run_not_cancellable"


def test_a_training_run_hears_of_its_cancellation_with_the_lease(stores: Stores) -> None:
    run = start(stores)
    assert stores.runs.cancel(run.id).status is RunStatus.TRAINING
    assert stores.runs.renew(run) is True


def test_a_run_that_began_while_it_was_cancelled_is_not_ended_behind_its_worker(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = stores.runs.request(Trigger.MANUAL)
    seen = stores.runs.get(run.id)
    stores.runs.start(run.id)
    answers = iter([seen, stores.runs.get(run.id)])
    monkeypatch.setattr(stores.runs, "get", lambda _: next(answers))
    assert stores.runs.cancel(run.id).status is RunStatus.TRAINING
    monkeypatch.undo()
    assert stores.runs.get(run.id).status is RunStatus.TRAINING


@pytest.mark.parametrize("news", ["submit", "retract", "release", "request"])
def test_a_hold_ends_with_news(stores: Stores, worker: ScriptedWorker, news: str) -> None:
    [edit] = stores.edits.submit([fact("a", "1")])
    if news == "release":
        stores.redis.hset(f"errata:edit:{edit.id}", "status", "held")
    run, _ = stores.runs.request(Trigger.IMMEDIATE)
    stores.runs.cancel(run.id)
    assert not stores.runs.idle()
    match news:
        case "submit":
            stores.edits.submit([fact("b", "2")])
        case "retract":
            stores.edits.retract(edit.id)
        case "release":
            stores.edits.release(edit.id)
        case "request":
            asked, _ = stores.runs.request(Trigger.MANUAL)
            stores.runs.start(asked.id)
            stores.runs.finish(asked.id, RunStatus.FAILED)
    assert stores.runs.idle()


def test_progress_is_kept(stores: Stores) -> None:
    run = start(stores)
    for number in (1, 2):
        stores.runs.add_epoch(run, EpochLoss(epoch=number, loss=1 / number, steps=3, seconds=0.5), eta_s=None)
    stores.runs.add_timing(run, "train", 1.0)
    stores.runs.add_timing(run, "commit", 0.25)
    stores.runs.update(run, phase="evaluate", edits=5, new_edits=2)
    found = stores.runs.get(run.id)
    assert [epoch.epoch for epoch in found.epochs] == [1, 2]
    assert found.timings == {"train": 1.0, "commit": 0.25}
    assert (found.phase, found.edits, found.new_edits, found.eta_s) == ("evaluate", 5, 2, None)


def test_pages_are_newest_first(stores: Stores) -> None:
    ids = []
    for _ in range(5):
        run = start(stores)
        stores.runs.finish(run.id, RunStatus.SUCCEEDED)
        ids.append(run.id)
    page = stores.runs.page(after=None, limit=3)
    assert ([run.id for run in page.data], page.has_more) == (ids[:1:-1], True)
    page = stores.runs.page(after=ids[2], limit=3)
    assert ([run.id for run in page.data], page.has_more) == (ids[1::-1], False)
    with pytest.raises(InvalidRequestError):
        stores.runs.page(after="run_nowhere", limit=3)


def test_workers_are_heard_of_for_a_while(stores: Stores) -> None:
    stores.runs.beat("one")
    assert stores.runs.workers(within_s=5) == ["one"]
    assert stores.runs.workers(within_s=-1) == []
    stores.runs.leave("one")
    assert stores.runs.workers(within_s=5) == []


def test_a_run_that_waits_or_is_under_way_is_not_idle(stores: Stores) -> None:
    assert stores.runs.idle()
    run, _ = stores.runs.request(Trigger.MANUAL)
    assert not stores.runs.idle()
    stores.runs.start(run.id)
    assert not stores.runs.idle()
    stores.runs.finish(run.id, RunStatus.SUCCEEDED)
    assert stores.runs.idle()
