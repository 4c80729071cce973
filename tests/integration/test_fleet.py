"""Fleet between a real Redis and scripted nodes: enough of them hold a version, and who cannot is left out."""

import itertools
import json
from contextlib import suppress
from dataclasses import asdict

import httpx
import pytest
from scripted_clock import Clock
from scripted_node import TOKEN, ScriptedNode
from scripted_worker import ScriptedWorker

from service.ejection import Ejection, ejections
from service.errors import UnavailableError
from service.fleet import Fleet
from service.nodes import NodeClient, NodeRefusedError
from service.schemas import VersionRecord
from service.stores import Stores

DAMAGED, AWAY = (409, "damaged_version"), (503, "store_unavailable")


@pytest.fixture
def nodes() -> list[ScriptedNode]:
    return [ScriptedNode() for _ in range(3)]


@pytest.fixture
def base(stores: Stores, worker: ScriptedWorker) -> VersionRecord:
    return stores.registry.get(0)


def fleet_of(stores: Stores, nodes: list[ScriptedNode], clock: Clock, *, quorum: float = 1) -> Fleet:
    clients = [node.client(f"http://node{number}") for number, node in enumerate(nodes)]
    return Fleet(clients, stores.redis, stores.events, stores.measures, quorum=quorum, clock=clock)


def addresses(fleet: Fleet) -> list[str]:
    return [node.address for node in fleet.serving()]


def events(stores: Stores) -> list[str]:
    return [fields["type"] for _, fields in stores.redis.xrange("errata:events") if "node." in fields["type"]]


def test_a_version_is_loaded_on_every_node_that_answers(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock
) -> None:
    nodes[1].ready = False
    holding = fleet_of(stores, nodes, clock).load(7)
    assert [node.address for node in holding] == ["http://node0", "http://node2"]
    assert [7 in node.resident for node in nodes] == [True, False, True]


def test_without_a_node_nothing_is_loaded(stores: Stores, nodes: list[ScriptedNode], clock: Clock) -> None:
    for node in nodes:
        node.ready = False
    with pytest.raises(UnavailableError) as error:
        fleet_of(stores, nodes, clock).load(7)
    assert error.value.code == "no_ready_node"


def test_what_every_node_refuses_is_refused(stores: Stores, nodes: list[ScriptedNode], clock: Clock) -> None:
    for node in nodes:
        node.refuses[7] = DAMAGED
    fleet = fleet_of(stores, nodes, clock)
    with pytest.raises(NodeRefusedError) as error:
        fleet.load(7)
    assert error.value.code == "damaged_version"
    assert len(addresses(fleet)) == 3, "the version is at fault, not the nodes"


def test_a_node_that_refuses_what_others_hold_is_left_out(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock
) -> None:
    nodes[0].refuses[7] = DAMAGED
    fleet = fleet_of(stores, nodes, clock)
    assert len(fleet.load(7)) == 2
    assert addresses(fleet) == ["http://node1", "http://node2"]
    assert ejections(stores.redis)["http://node0"].reason.endswith("version 7 refused")
    assert events(stores) == ["node.left_out"]


def test_a_node_that_holds_other_bits_is_left_out(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, base: VersionRecord
) -> None:
    nodes[2].damaged = {0}
    fleet = fleet_of(stores, nodes, clock)
    assert [node.address for node in fleet.load(0, base.tensors)] == ["http://node0", "http://node1"]
    assert addresses(fleet) == ["http://node0", "http://node1"]


@pytest.mark.parametrize(("quorum", "silent", "enough"), [(1, 1, False), (0.6, 1, True), (0.6, 2, False)])
def test_a_node_that_may_load_it_later_is_waited_for_unless_the_quorum_holds_it(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, quorum: float, silent: int, enough: bool
) -> None:
    for node in nodes[:silent]:
        node.refuses[7] = AWAY
    fleet = fleet_of(stores, nodes, clock, quorum=quorum)
    if enough:
        assert len(fleet.load(7)) == 3 - silent
    else:
        with pytest.raises(UnavailableError, match=f"{3 - silent} of 3 nodes hold version 7, . must"):
            fleet.load(7)
    assert len(addresses(fleet)) == 3, "what it holds it serves"


def test_a_quorum_is_never_nobody(stores: Stores, nodes: list[ScriptedNode], clock: Clock) -> None:
    nodes[0].refuses[7], nodes[1].refuses[7], nodes[2].refuses[7] = DAMAGED, DAMAGED, AWAY
    with pytest.raises(UnavailableError):
        fleet_of(stores, nodes, clock, quorum=0.01).load(7)


def test_a_node_that_is_left_out_is_tried_again_less_and_less_often(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, base: VersionRecord
) -> None:
    nodes[0].refuses[0], nodes[0].resident = DAMAGED, set()
    fleet = fleet_of(stores, nodes, clock)
    tried = []
    for _ in range(200):
        before = ejections(stores.redis).get("http://node0")
        fleet.heal(base)
        if ejections(stores.redis)["http://node0"] != before:
            tried.append(clock.now)
        clock.now += 1
    waits = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert waits == [2, 4, 8, 16, 30, 30, 30, 30, 30]
    assert events(stores).count("node.left_out") == 1


def test_a_node_that_was_tried_for_hours_is_tried_on(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, base: VersionRecord
) -> None:
    nodes[0].refuses[0], nodes[0].resident = DAMAGED, set()
    tried = Ejection("it was refused", attempts=5000, again_at=clock.now)
    stores.redis.hset("errata:nodes:ejected", "http://node0", json.dumps(asdict(tried)))
    fleet_of(stores, nodes, clock).heal(base)
    again = ejections(stores.redis)["http://node0"]
    assert (again.attempts, again.again_at - clock.now) == (5001, 30)


def test_a_node_that_holds_the_active_version_again_is_taken_back(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, base: VersionRecord
) -> None:
    nodes[0].refuses[0], nodes[0].resident = DAMAGED, set()
    fleet = fleet_of(stores, nodes, clock)
    fleet.heal(base)
    assert addresses(fleet) == ["http://node1", "http://node2"]
    nodes[0].refuses.clear()
    clock.now += 1
    fleet.heal(base)
    assert len(addresses(fleet)) == 2, "not before its time"
    clock.now += 1
    fleet.heal(base)
    assert len(addresses(fleet)) == 3
    assert events(stores)[-2:] == ["node.left_out", "node.taken_back"]


def test_a_node_that_still_holds_other_bits_is_not_taken_back(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, base: VersionRecord
) -> None:
    nodes[0].damaged = {0}
    fleet = fleet_of(stores, nodes, clock)
    fleet.load(0, base.tensors)
    clock.now += 100
    fleet.heal(base)
    assert len(addresses(fleet)) == 2
    nodes[0].damaged.clear()
    clock.now += 100
    fleet.heal(base)
    assert len(addresses(fleet)) == 3


def test_an_activation_does_not_take_a_node_back_that_holds_other_bits(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, base: VersionRecord
) -> None:
    nodes[0].damaged = {0}
    fleet = fleet_of(stores, nodes, clock)
    fleet.load(0, base.tensors)
    clock.now += 100
    assert len(fleet.load(0)) == 2
    assert len(addresses(fleet)) == 2


@pytest.mark.parametrize(("refusing", "serving"), [(1, 2), (2, 1), (3, 3)])
def test_for_an_active_version_that_all_refuse_none_is_left_out(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, base: VersionRecord, refusing: int, serving: int
) -> None:
    for node in nodes[:refusing]:
        node.refuses[0], node.resident = DAMAGED, {7}
    fleet = fleet_of(stores, nodes, clock)
    fleet.heal(base)
    assert len(addresses(fleet)) == serving


def test_a_node_that_refuses_to_say_what_it_holds_is_left_out_though_it_is_the_only_one(
    stores: Stores, base: VersionRecord
) -> None:
    """It may demand another token; that is about no version."""

    def deaf(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if request.url.path == "/health" else 401)

    client = NodeClient("http://deaf", token=TOKEN, timeout_s=5, transport=httpx.MockTransport(deaf))
    fleet = Fleet([client], stores.redis, stores.events, stores.measures, quorum=1)
    fleet.heal(base)
    assert addresses(fleet) == []


def test_a_node_that_refuses_serves_on_until_another_is_known_to_hold_it(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, base: VersionRecord
) -> None:
    nodes[0].refuses[0], nodes[0].resident = DAMAGED, {7}
    nodes[1].hangs = nodes[2].hangs = True
    fleet = fleet_of(stores, nodes, clock)
    fleet.heal(base)
    assert len(addresses(fleet)) == 3
    nodes[2].hangs = False
    fleet.heal(base)
    assert addresses(fleet) == ["http://node1", "http://node2"]


def test_where_none_serves_those_that_are_left_out_may_hold_what_is_to_be_active(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, base: VersionRecord
) -> None:
    fleet = fleet_of(stores, nodes, clock)
    for client in fleet.serving():
        fleet.eject(client, NodeRefusedError("it refused version 7"))
    nodes[0].damaged, nodes[1].refuses = {0}, {0: DAMAGED}
    fleet.load_to_activate(base)
    assert addresses(fleet) == [], "not before it is looked at"
    fleet.heal(base)
    assert addresses(fleet) == ["http://node2"], "the others hold it wrong, or not"
    nodes[2].ready = False
    with pytest.raises(NodeRefusedError):
        fleet.load_to_activate(base)
    nodes[0].ready = nodes[1].ready = False
    with pytest.raises(UnavailableError) as error:
        fleet.load_to_activate(base)
    assert error.value.code == "no_ready_node"


def test_who_is_left_out_is_not_asked_to_hold_what_is_to_be_active_while_others_serve(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, base: VersionRecord
) -> None:
    fleet = fleet_of(stores, nodes, clock)
    fleet.eject(fleet.serving()[0], NodeRefusedError("it refused version 7"))
    nodes[0].resident = set()
    fleet.load_to_activate(base)
    assert nodes[0].resident == set()


def test_a_node_that_is_busy_goes_on_serving(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, base: VersionRecord
) -> None:
    nodes[0].refuses[0], nodes[0].resident = AWAY, {7}
    fleet = fleet_of(stores, nodes, clock)
    fleet.heal(base)
    assert len(addresses(fleet)) == 3
    nodes[0].refuses.clear()
    fleet.heal(base)
    assert nodes[0].resident == {0, 7}


def test_every_process_knows_who_is_left_out(stores: Stores, nodes: list[ScriptedNode], clock: Clock) -> None:
    nodes[0].refuses[7] = DAMAGED
    fleet_of(stores, nodes, clock).load(7)
    assert addresses(fleet_of(stores, nodes, clock)) == ["http://node1", "http://node2"]


def test_what_is_to_keep_its_slot_is_loaded_and_pinned_once(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock
) -> None:
    fleet = fleet_of(stores, nodes, clock)
    for _ in range(2):
        fleet.pin({0, 7})
    assert [(node.pins, node.resident) for node in nodes] == [([[0, 7]], {0, 7})] * 3
    fleet.pin({7, 8})
    assert [node.pinned for node in nodes] == [{7, 8}] * 3


def test_a_version_that_a_node_cannot_hold_does_not_cost_the_others_their_pins(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock
) -> None:
    nodes[0].refuses[7] = DAMAGED
    fleet = fleet_of(stores, nodes, clock)
    fleet.pin({0, 7})
    assert [node.pinned for node in nodes] == [{0}, {0, 7}, {0, 7}]
    assert len(addresses(fleet)) == 3, "what nobody must hold costs no node its service"


def test_a_node_with_too_few_slots_is_told_of_and_the_others_pin(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    nodes[0].most_pins = 2
    fleet_of(stores, nodes, clock).pin({0, 7})
    assert [node.pinned for node in nodes] == [set(), {0, 7}, {0, 7}]
    [told] = [record for record in caplog.records if record.message == "node.not_pinned"]
    assert told.__dict__["node"] == "http://node0"


def test_a_node_that_cannot_load_for_long_is_left_out_and_holds_nobody_up(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock
) -> None:
    nodes[0].refuses[7] = AWAY
    fleet = fleet_of(stores, nodes, clock)
    for _ in range(60):
        with pytest.raises(UnavailableError):
            fleet.load(7)
        clock.now += 1
    assert [node.address for node in fleet.load(7)] == ["http://node1", "http://node2"]
    assert ejections(stores.redis)["http://node0"].reason.startswith("for 60 s: ")


def test_a_node_that_loads_it_in_between_is_waited_for_anew(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock
) -> None:
    fleet = fleet_of(stores, nodes, clock)
    for away in (True, False, True):
        nodes[0].refuses = {7: AWAY} if away else {}
        nodes[0].resident.discard(7)
        with suppress(UnavailableError):
            fleet.load(7)
        clock.now += 45
    assert ejections(stores.redis) == {}


def test_nodes_that_all_cannot_load_are_waited_for_and_none_is_left_out(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock
) -> None:
    for node in nodes:
        node.refuses[7] = AWAY
    fleet = fleet_of(stores, nodes, clock)
    for _ in range(2):
        with pytest.raises(UnavailableError):
            fleet.load(7)
        clock.now += 100
    assert ejections(stores.redis) == {}


@pytest.mark.parametrize("hanging", [1, 3])
def test_a_node_whose_engine_hangs_is_left_out_if_others_serve(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, base: VersionRecord, hanging: int
) -> None:
    for node in nodes[:hanging]:
        node.hangs = True
    fleet = fleet_of(stores, nodes, clock)
    fleet.heal(base)
    clock.now += 59
    fleet.heal(base)
    assert ejections(stores.redis) == {}
    clock.now += 1
    fleet.heal(base)
    assert list(ejections(stores.redis)) == (["http://node0"] if hanging == 1 else [])


def test_a_node_that_hangs_on_is_asked_less_and_less_often_and_taken_back_when_it_answers(
    stores: Stores, nodes: list[ScriptedNode], clock: Clock, base: VersionRecord
) -> None:
    nodes[0].hangs = True
    fleet = fleet_of(stores, nodes, clock)
    for _ in range(2):
        fleet.heal(base)
        clock.now += 60
    fleet.heal(base)
    assert ejections(stores.redis)["http://node0"].attempts == 2
    nodes[0].hangs = False
    clock.now += 60
    fleet.heal(base)
    assert ejections(stores.redis) == {}
