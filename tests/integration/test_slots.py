"""SlotCheck between a real Redis and scripted nodes: what a device holds is what was trained, or it is loaded again."""

import httpx
import pytest
from scripted_clock import Clock
from scripted_node import ScriptedNode
from scripted_worker import ScriptedWorker, fact

from service.ejection import ejections
from service.fleet import Fleet
from service.nodes import NodeClient
from service.reconcile import Reconciler
from service.slots import SlotCheck
from service.stores import Stores

EVERY_S = 10.0


def check_of(stores: Stores, clock: Clock, *nodes: NodeClient) -> SlotCheck:
    fleet = Fleet(nodes, stores.redis, stores.events, stores.measures, quorum=1)
    return SlotCheck(fleet, stores, every_s=EVERY_S, clock=clock)


@pytest.fixture
def check(stores: Stores, clock: Clock, node: ScriptedNode) -> SlotCheck:
    return check_of(stores, clock, node.client())


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
        check.look()
        check.look()
        clock.now += EVERY_S
    assert node.read_back == [*served, *served[:2]]


def test_a_version_in_host_memory_is_not_put_into_a_slot_to_be_looked_at(
    check: SlotCheck, clock: Clock, node: ScriptedNode, served: list[int]
) -> None:
    node.slots = {1}
    for _ in range(3):
        check.look()
        clock.now += EVERY_S
    assert node.read_back == [1, 1, 1]


def test_a_damaged_slot_is_loaded_again_and_told_of(
    check: SlotCheck, clock: Clock, node: ScriptedNode, served: list[int], stores: Stores
) -> None:
    node.damaged = {1}
    for _ in served:
        check.look()
        clock.now += EVERY_S
    # Of the damaged one once more, after it was loaded again.
    assert node.read_back == [0, 1, 1, 2]
    assert (node.damaged, node.slots) == (set(), {0, 1, 2})
    assert damaged_events(stores) == ['{"address": "http://node", "version": 1}']


def test_a_node_whose_slot_stays_damaged_serves_no_more(
    check: SlotCheck, clock: Clock, node: ScriptedNode, served: list[int], stores: Stores
) -> None:
    node.slots, node.damaged, node.reloads_damaged = {2}, {2}, True
    for _ in range(2):
        check.look()
        clock.now += EVERY_S
    assert "does not hold version 2 as it was trained" in ejections(stores.redis)["http://node"].reason
    assert len(damaged_events(stores)) == 1, "who does not serve is not looked at"


def test_one_node_that_does_not_say_does_not_keep_another_from_being_checked(
    stores: Stores, clock: Clock, node: ScriptedNode, served: list[int]
) -> None:
    def only_healthy(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if request.url.path == "/health" else 500)

    broken = NodeClient("http://broken", token="t", timeout_s=5, transport=httpx.MockTransport(only_healthy))
    check_of(stores, clock, broken, node.client()).look()
    assert node.read_back == [0]


def test_a_version_that_nobody_registered_is_left_alone(
    check: SlotCheck, node: ScriptedNode, served: list[int]
) -> None:
    node.resident, node.slots = {77}, {77}
    check.look()
    assert (node.read_back, node.slots) == ([], {77})


def test_the_control_workers_tick_checks(
    reconciler: Reconciler, node: ScriptedNode, served: list[int], stores: Stores
) -> None:
    node.damaged, node.slots = {0}, {0}
    reconciler.tick()
    assert len(damaged_events(stores)) == 1
