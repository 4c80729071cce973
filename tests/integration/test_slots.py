"""SlotCheck between a real Redis and scripted nodes: what a device holds is what was trained, or it is loaded again."""

import logging

import pytest
from scripted_node import ScriptedNode
from scripted_worker import ScriptedWorker, fact

from service.nodes import NodeClient
from service.reconcile import Reconciler
from service.slots import SlotCheck
from service.stores import Stores

EVERY_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def check(stores: Stores, clock: Clock) -> SlotCheck:
    return SlotCheck(stores.registry, stores.events, every_s=EVERY_S, clock=clock)


@pytest.fixture
def served(stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler) -> list[int]:
    """Two published versions, and version 0, in slots."""
    for prompt in ("a", "b"):
        stores.edits.submit([fact(prompt, "1")])
        run, _ = worker.train()
        reconciler.publish(run.id)
    node.slots = {0, 1, 2}
    node.read_back.clear()
    return sorted(node.slots)


def damaged_events(stores: Stores) -> list[str]:
    rows = stores.redis.xrange("errata:events")
    return [fields["data"] for _, fields in rows if fields["type"] == "node.slot_damaged"]


def test_slots_are_read_back_in_turn_one_at_a_time(
    check: SlotCheck, clock: Clock, node: ScriptedNode, served: list[int]
) -> None:
    for _ in range(5):
        check.look([node.client()])
        check.look([node.client()])
        clock.now += EVERY_S
    assert node.read_back == [*served, *served[:2]]


def test_a_version_in_host_memory_is_not_put_into_a_slot_to_be_looked_at(
    check: SlotCheck, clock: Clock, node: ScriptedNode, served: list[int]
) -> None:
    node.slots = {1}
    for _ in range(3):
        check.look([node.client()])
        clock.now += EVERY_S
    assert node.read_back == [1, 1, 1]


def test_a_damaged_slot_is_loaded_again_and_told_of(
    check: SlotCheck, clock: Clock, node: ScriptedNode, served: list[int], stores: Stores
) -> None:
    node.damaged = {1}
    for _ in served:
        check.look([node.client()])
        clock.now += EVERY_S
    # Of the damaged one once more, after it was loaded again.
    assert node.read_back == [0, 1, 1, 2]
    assert (node.damaged, node.slots) == (set(), {0, 1, 2})
    assert damaged_events(stores) == ['{"address": "http://node", "version": 1}']


def test_a_slot_that_stays_damaged_is_told_of_each_time(
    check: SlotCheck, clock: Clock, node: ScriptedNode, served: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    node.slots, node.damaged, node.reloads_damaged = {2}, {2}, True
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            check.look([node.client()])
            clock.now += EVERY_S
    assert [record.message for record in caplog.records] == ["slot.damaged", "slot.still_damaged"] * 2


def test_one_node_that_is_away_does_not_keep_another_from_being_checked(
    check: SlotCheck, node: ScriptedNode, served: list[int]
) -> None:
    away = ScriptedNode()
    away.ready = False
    nodes: list[NodeClient] = [away.client("http://away"), node.client()]
    check.look(nodes)
    assert node.read_back == [0]


def test_a_version_that_nobody_registered_is_left_alone(
    check: SlotCheck, node: ScriptedNode, served: list[int]
) -> None:
    node.resident, node.slots = {77}, {77}
    check.look([node.client()])
    assert (node.read_back, node.slots) == ([], {77})


def test_the_control_workers_tick_checks(
    reconciler: Reconciler, node: ScriptedNode, served: list[int], stores: Stores
) -> None:
    node.damaged, node.slots = {0}, {0}
    reconciler.tick()
    assert len(damaged_events(stores)) == 1
