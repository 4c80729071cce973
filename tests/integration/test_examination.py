"""What `errata doctor` finds in a real Redis: what the processes said of themselves."""

import time

import pytest
from scripted_node import ScriptedNode
from scripted_worker import ScriptedWorker

from service.doctor import Finding, Level, examine
from service.errors import UnavailableError
from service.nodes import NodeClient
from service.reconcile import Reconciler
from service.schemas import EditError, RunStatus
from service.settings import Settings
from service.stores import Stores

NODE = "node http://node"


@pytest.fixture(autouse=True)
def reached(monkeypatch: pytest.MonkeyPatch, node: ScriptedNode) -> None:
    monkeypatch.setattr(NodeClient, "all", lambda _: [node.client()])


def found(settings: Settings) -> dict[str, Finding]:
    return {finding.part: finding for finding in examine(settings, url=None)}


def test_a_stack_that_is_well_is_found_well(settings: Settings, worker: ScriptedWorker, reconciler: Reconciler) -> None:
    reconciler.tick()
    findings = found(settings)
    assert {findings[part].level for part in ("control worker", "runs", NODE)} == {Level.OK}


def test_a_node_that_is_left_out_is_a_failure(
    settings: Settings, worker: ScriptedWorker, reconciler: Reconciler, node: ScriptedNode
) -> None:
    reconciler.fleet.eject(node.client(), UnavailableError("its disk is full"))
    assert found(settings)[NODE].level is Level.FAIL
    assert "its disk is full" in found(settings)[NODE].found


def test_runs_that_fail_in_a_row_are_a_failure(settings: Settings, stores: Stores, worker: ScriptedWorker) -> None:
    error = EditError(code="gate", message="too few were learned")
    levels = []
    for _ in range(3):
        stores.runs.finish(worker.begin()[0].id, RunStatus.FAILED, error=error)
        levels.append(found(settings)["runs"].level)
    assert levels == [Level.WARN, Level.WARN, Level.FAIL]
    assert "too few were learned (gate)" in found(settings)["runs"].found


def test_a_control_worker_whose_looks_come_to_nothing_is_a_failure(
    settings: Settings, stores: Stores, worker: ScriptedWorker
) -> None:
    """Its messages leave the queue all the same."""
    assert "never" in found(settings)["control worker"].found
    stores.measures.tick(time.time() - 60, {})
    assert found(settings)["control worker"].level is Level.FAIL
    worker.train()
    assert found(settings)["control worker"].level is Level.WARN, "a verification may take so long"
