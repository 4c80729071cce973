"""An edit that a run fails by is found and set aside within the run, and the others go live."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from training_bench import Bench

from service.runs import LeaseLostError
from service.schemas import EditError, EditStatus, RunStatus, Trigger
from worker import run as worker_run
from worker.evaluation.gate import GateDecision
from worker.training.encode import TokenSequence
from worker.training.learner import Learner, Losses


class Gate:
    """Rejects a candidate that has been taught too many of the bad prompts."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bad: set[str] = set()
        self.allowed = 0
        self.judged: list[list[str]] = []
        bench.trainer.settings.__dict__["evaluate_sample"] = 100
        real = bench.trainer.workbench.evaluate

        def evaluate(edits: Sequence[Any], *rest: Any) -> Any:
            self.judged.append([edit.prompt for edit in edits])
            return real(edits, *rest)

        monkeypatch.setattr(bench.trainer.workbench, "evaluate", evaluate)
        monkeypatch.setattr(worker_run, "decide", lambda *_: self.decide())

    def decide(self) -> GateDecision:
        passed = len(self.bad & set(self.judged[-1])) <= self.allowed
        return GateDecision(passed=passed, reasons=() if passed else ("perplexity grew",))


@pytest.fixture
def gate(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(bench, monkeypatch)


def submit(bench: Bench, *prompts: str) -> list[str]:
    return [bench.submit(prompt, "yes") for prompt in prompts]


def statuses(bench: Bench, ids: Sequence[str]) -> list[str]:
    return [edit.status.value for edit in bench.stores.edits.get_many(ids)]


def error_of(bench: Bench, edit: str) -> EditError:
    error = bench.stores.edits.get(edit).error
    assert error is not None
    return error


def test_an_edit_that_the_gate_rejects_is_found_and_the_others_go_live(bench: Bench, gate: Gate) -> None:
    [old] = submit(bench, "old")
    bench.run()
    ids = submit(bench, "a", "b", "c", "d", "e")
    gate.bad = {"d"}
    run = bench.run()
    assert (run.status, run.version) == (RunStatus.SUCCEEDED, 2)
    assert statuses(bench, [old, *ids]) == ["live", "live", "live", "live", "failed", "live"]
    error = error_of(bench, ids[3])
    assert (error.code, error.message) == (
        "gate_rejected",
        "the other edits are learned without it; with it: perplexity grew",
    )
    kept = [edit["prompt"] for edit in bench.trainer.versions.edits(2)]
    assert kept == ["old", "a", "b", "c", "e"]
    assert sorted(gate.judged[1]) == ["a", "b", "c", "d", "e", "old"]
    assert gate.judged[2] == ["old"], "what was there before is cleared of it first"
    assert len(gate.judged) <= 2 + 1 + 3 + 1


def test_two_culprits_are_found(bench: Bench, gate: Gate) -> None:
    ids = submit(bench, "a", "b", "c", "d")
    gate.bad = {"a", "c"}
    assert bench.run().status is RunStatus.SUCCEEDED
    assert statuses(bench, ids) == ["failed", "live", "failed", "live"]


def test_more_culprits_than_are_looked_for_end_the_run(bench: Bench, gate: Gate) -> None:
    ids = submit(bench, "a", "b", "c", "d", "e", "f")
    gate.bad = {"a", "b", "c", "d"}
    run = bench.run()
    assert run.error is not None
    assert (run.status, run.error.code) == (RunStatus.FAILED, "gate_rejected")
    assert statuses(bench, ids) == ["failed", "failed", "failed", "queued", "queued", "queued"]
    assert bench.run().status is RunStatus.SUCCEEDED
    assert statuses(bench, ids[3:]) == ["failed", "live", "live"]


def test_when_all_are_culprits_there_is_no_version(bench: Bench, gate: Gate) -> None:
    submit(bench, "old")
    bench.run()
    ids = submit(bench, "a", "b")
    gate.bad = {"a", "b"}
    assert bench.run().status is RunStatus.FAILED
    assert statuses(bench, ids) == ["failed", "failed"]
    assert [record.version for record in bench.stores.registry.all()] == [1, 0]


def test_what_fails_without_the_new_edits_is_not_their_fault(bench: Bench, gate: Gate) -> None:
    [old] = submit(bench, "old")
    bench.run()
    ids = submit(bench, "a", "b", "c")
    gate.bad = {"old"}
    run = bench.run()
    assert run.error is not None
    assert (run.status, run.error.message) == (RunStatus.FAILED, "perplexity grew")
    assert statuses(bench, [old, *ids]) == ["live", "queued", "queued", "queued"]
    assert [edit.attempts for edit in bench.stores.edits.get_many(ids)] == [1, 1, 1]
    assert len(gate.judged) == 3


def test_an_edit_alone_is_tried_again(bench: Bench, gate: Gate) -> None:
    ids = submit(bench, "a")
    gate.bad = {"a"}
    for status in ("queued", "queued", "failed"):
        assert bench.run().status is RunStatus.FAILED
        assert statuses(bench, ids) == [status]


def test_edits_that_fail_only_together_lose_the_last(bench: Bench, gate: Gate) -> None:
    ids = submit(bench, "a", "b", "c", "d")
    gate.bad, gate.allowed = {"a", "c", "d"}, 2
    assert bench.run().status is RunStatus.SUCCEEDED
    assert statuses(bench, ids) == ["live", "live", "live", "failed"]


@pytest.fixture
def diverging(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of edits with the target `boom` are no numbers."""
    real, decode = Learner.visit, bench.trainer.base.tokenizer.decode

    def visit(self: Learner, batch: Sequence[TokenSequence], **how: Any) -> Losses:
        found = real(self, batch, **how)
        lost = torch.tensor(["boom" in decode(sequence.target) for sequence in batch])
        return dataclasses.replace(found, per_sequence=torch.where(lost, torch.nan, found.per_sequence))

    monkeypatch.setattr(Learner, "visit", visit)


@pytest.mark.usefixtures("diverging")
def test_an_edit_whose_loss_is_no_number_names_itself(bench: Bench) -> None:
    ids = [*submit(bench, "a", "b", "c"), bench.submit("d", "boom"), *submit(bench, "e", "f", "g", "h")]
    run = bench.run()
    assert run.status is RunStatus.SUCCEEDED
    assert statuses(bench, ids) == ["live", "live", "live", "failed", "live", "live", "live", "live"]
    error = error_of(bench, ids[3])
    assert error.code == "training_diverged"
    assert "the loss is not a number any more in epoch 1" in error.message
    assert len(bench.starts) == 2, "no search is needed"


@pytest.mark.parametrize("end", ["cancelled", "taken over"])
def test_a_run_that_ends_while_it_searches_sets_nothing_aside(
    bench: Bench, gate: Gate, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    ids = submit(bench, "a", "b", "c", "d")
    gate.bad = {"b"}
    stores = bench.stores
    decide = gate.decide

    def stop() -> GateDecision:
        decision = decide()
        run = stores.runs.current()
        if run and len(gate.judged) == 2:
            if end == "cancelled":
                bench.trainer.stopping.set()
            else:
                stores.runs.finish(run.id, RunStatus.FAILED)
                stores.edits.unclaim(run.id)
        return decision

    monkeypatch.setattr(gate, "decide", stop)
    run = bench.run()
    assert run.status is (RunStatus.CANCELLED if end == "cancelled" else RunStatus.FAILED)
    assert len(gate.judged) == 2
    assert statuses(bench, ids) == ["queued"] * 4
    assert [edit.attempts for edit in stores.edits.get_many(ids)] == [0 if end == "cancelled" else 1] * 4


def test_only_the_run_that_has_an_edit_may_set_it_aside(bench: Bench) -> None:
    stores, error = bench.stores, EditError(code="gate_rejected", message="no")
    ids = submit(bench, "a", "b")
    old = stores.runs.start(stores.runs.request(Trigger.MANUAL)[0].id)
    assert old is not None
    stores.edits.claim(old.id)
    stores.runs.finish(old.id, RunStatus.FAILED)
    with pytest.raises(LeaseLostError):
        stores.edits.set_aside(old.id, old.token, ids, error)
    new = stores.runs.start(stores.runs.request(Trigger.MANUAL)[0].id)
    assert new is not None
    with pytest.raises(LeaseLostError):
        stores.edits.set_aside(old.id, old.token, ids, error)
    assert stores.edits.set_aside(new.id, new.token, ids, error) == [], "these are the old one's yet"
    stores.edits.unclaim(old.id)
    stores.edits.claim(new.id)
    stores.edits.retract(ids[0])
    assert stores.edits.set_aside(new.id, new.token, ids, error) == [ids[1]]
    assert statuses(bench, ids) == [EditStatus.RETRACTING, EditStatus.FAILED]
