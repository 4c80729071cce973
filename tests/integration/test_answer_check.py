"""AnswerCheck between a real Redis and scripted nodes: a version answers as it did when it was verified."""

import httpx
import pytest
from scripted_clock import Clock
from scripted_node import ScriptedNode
from scripted_worker import ScriptedWorker, fact

from service.answer_check import AnswerCheck
from service.ejection import ejections
from service.fleet import Fleet
from service.nodes import NodeClient
from service.queue import TaskQueue
from service.reconcile import Reconciler
from service.settings import Settings
from service.stores import Stores

EVERY_S = 10.0


def check_of(stores: Stores, clock: Clock, *nodes: NodeClient, every_s: float = EVERY_S) -> AnswerCheck:
    fleet = Fleet(nodes, stores.redis, stores.events, stores.measures, quorum=1)
    return AnswerCheck(fleet, stores, every_s=every_s, max_tokens=64, clock=clock)


@pytest.fixture
def check(stores: Stores, clock: Clock, node: ScriptedNode) -> AnswerCheck:
    return check_of(stores, clock, node.client())


@pytest.fixture
def served(stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler) -> None:
    """Versions 0 to 3 in slots, the last one active; each taught one edit more: a, b, c."""
    for prompt in ("a", "b", "c"):
        stores.edits.submit([fact(prompt, f"{prompt}!")])
        run, _ = worker.train()
        reconciler.publish(run.id)
    node.slots = {0, 1, 2, 3}
    node.asked.clear()


def told(stores: Stores) -> list[str]:
    rows = stores.redis.xrange("errata:events")
    return [fields["data"] for _, fields in rows if fields["type"] == "node.answer_wrong"]


def counted(stores: Stores) -> tuple[float, float]:
    kept = stores.measures.kept()
    right, wrong = (kept.get(f"errata_answers_checked_total|{outcome}", 0) for outcome in ("right", "wrong"))
    return right, wrong


def test_one_question_at_a_time_the_active_version_first_and_the_others_in_turn(
    check: AnswerCheck, clock: Clock, node: ScriptedNode, served: None, stores: Stores
) -> None:
    for _ in range(4):
        check.look()
        check.look()
        clock.now += EVERY_S
    # Of version 0 nothing is recorded; of the others the edit that they added.
    assert node.asked == [(3, "c"), (1, "a"), (2, "b"), (3, "c")]
    assert counted(stores) == (4, 0)


def test_a_version_that_becomes_active_is_asked_next(
    check: AnswerCheck, clock: Clock, node: ScriptedNode, served: None, stores: Stores
) -> None:
    check.look()
    stores.registry.activate(2)
    clock.now += EVERY_S
    check.look()
    assert node.asked == [(3, "c"), (2, "b")]


def test_a_version_in_host_memory_is_not_asked(check: AnswerCheck, node: ScriptedNode, served: None) -> None:
    node.slots = {0}
    check.look()
    assert node.asked == []


def test_nobody_is_asked_where_the_setting_says_so(
    stores: Stores, clock: Clock, node: ScriptedNode, served: None
) -> None:
    off = check_of(stores, clock, node.client(), every_s=0)
    off.look()
    assert off.trouble(node.client(), 3) is None
    assert node.asked == []


def test_a_wrong_answer_is_told_of_and_the_version_loaded_again(
    check: AnswerCheck, node: ScriptedNode, served: None, stores: Stores, caplog: pytest.LogCaptureFixture
) -> None:
    node.garbled = {3}
    check.look()
    assert (node.garbled, node.slots) == (set(), {0, 1, 2, 3})
    assert node.asked == [(3, "c")] * 2
    edit = stores.edits.by_sequence([3])[0]
    assert told(stores) == [f'{{"address": "http://node", "version": 3, "edit": "{edit.id}"}}']
    assert counted(stores) == (1, 1)
    assert ejections(stores.redis) == {}
    [record] = [record for record in caplog.records if record.message == "answer.wrong"]
    assert record.__dict__.items() >= {"node": "http://node", "version": 3, "edit": edit.id}.items()


def test_a_node_that_answers_wrong_again_serves_no_more(
    check: AnswerCheck, clock: Clock, node: ScriptedNode, served: None, stores: Stores
) -> None:
    node.garbled, node.reloads_damaged = {3}, True
    for _ in range(2):
        check.look()
        clock.now += EVERY_S
    assert "does not answer at version 3 as it did" in ejections(stores.redis)["http://node"].reason
    assert len(told(stores)) == 1, "who does not serve is not asked"


def test_a_node_that_cannot_load_the_version_again_serves_no_more(
    check: AnswerCheck, node: ScriptedNode, served: None, stores: Stores
) -> None:
    node.garbled, node.refuses = {3}, {3: (409, "damaged_version")}
    check.look()
    assert ejections(stores.redis)["http://node"].reason.endswith("version 3 refused")


def test_a_node_is_taken_back_only_when_it_answers_right(
    queue: TaskQueue, settings: Settings, clock: Clock, node: ScriptedNode, served: None, stores: Stores
) -> None:
    node.garbled, node.reloads_damaged = {3}, True
    reconciler = Reconciler(stores, [node.client()], queue, settings, clock=clock)
    reconciler.tick()
    clock.now += 60
    reconciler.tick()
    again = ejections(stores.redis)["http://node"]
    assert (again.attempts, "does not answer at version 3" in again.reason) == (2, True)
    node.garbled.clear()
    clock.now += 60
    reconciler.tick()
    assert ejections(stores.redis) == {}


def test_what_was_answered_by_a_hair_or_wrong_is_no_truth(
    stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
) -> None:
    edits = stores.edits.submit([fact(prompt, "1") for prompt in ("sure", "unsure", "wrong")])
    node.margins, worker.mistakes = {"unsure": 0.5}, {"wrong": "2"}
    run, version = worker.train()
    reconciler.publish(run.id)
    assert stores.registry.active().active == version
    assert stores.registry.confident(version) == stores.edits.sequences([edits[0].id])


def test_a_version_that_adds_nothing_is_asked_what_it_kept(
    stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler, served: None
) -> None:
    stores.edits.retract(stores.edits.by_sequence([3])[0].id)
    run, version = worker.train()
    reconciler.publish(run.id)
    assert stores.registry.confident(version) == [1, 2]


def test_a_version_that_was_rejected_has_no_truth(
    stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
) -> None:
    stores.edits.submit([fact(prompt, "1") for prompt in "abc"])
    worker.mistakes = {"a": "2", "b": "2"}
    run, version = worker.train()
    reconciler.publish(run.id)
    assert stores.registry.confident(version) == []


def test_one_node_that_does_not_say_does_not_keep_another_from_being_asked(
    stores: Stores, clock: Clock, node: ScriptedNode, served: None
) -> None:
    def only_healthy(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if request.url.path == "/health" else 500)

    broken = NodeClient("http://broken", token="t", timeout_s=5, transport=httpx.MockTransport(only_healthy))
    check_of(stores, clock, broken, node.client()).look()
    assert node.asked == [(3, "c")]
    assert ejections(stores.redis) == {}


def test_the_control_workers_tick_asks(
    reconciler: Reconciler, node: ScriptedNode, served: None, stores: Stores
) -> None:
    node.garbled = {3}
    reconciler.tick()
    assert len(told(stores)) == 1
