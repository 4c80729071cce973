"""Random lives of edits against a real Redis: whatever comes in whatever order, these things hold."""

from collections import Counter, defaultdict

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as bounds
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scripted_worker import ScriptedWorker, fact

from service.audit import Actor, acting
from service.errors import ConflictError, OwnProposalError
from service.keys import EditKeys
from service.registry import OvertakenError
from service.schemas import Edit, EditStatus, Format, FormatOutcome, Run, RunStatus
from service.store import EditStore
from service.stores import Stores

PROMPTS = st.sampled_from(["p", "q"])
TARGETS = st.sampled_from(["one", "two", "three"])
CUMULATIVE = (EditStatus.QUEUED, EditStatus.TRAINING, EditStatus.TRAINED, EditStatus.LIVE)


def one_target_each(edits: list[Edit]) -> bool:
    targets = defaultdict(set)
    for edit in edits:
        targets[edit.prompt].add(edit.target)
    return all(len(found) == 1 for found in targets.values())


class Lives(RuleBasedStateMachine):
    """Clients, one worker, one publisher; each may do its next step at any time."""

    stores: Stores

    @initialize()
    def begin(self) -> None:
        if keys := list(self.stores.redis.scan_iter("errata:*")):
            self.stores.redis.delete(*keys)
        self.reviewed = EditStore(
            self.stores.redis,
            events_max=1000,
            idempotency_ttl_s=60,
            max_attempts=3,
            queue_max_edits=1000,
            review=True,
        )
        self.worker = ScriptedWorker(self.stores)
        self.worker.register_base()
        self.ids: list[str] = []
        self.run: Run | None = None
        self.members: list[Edit] = []
        self.version: int | None = None
        self.verified = [0]

    @rule(prompt=PROMPTS, answer=TARGETS)
    def submit(self, prompt: str, answer: str) -> None:
        self.ids.append(self.stores.edits.submit([fact(prompt, answer)])[0].id)

    @rule(prompt=PROMPTS, answer=TARGETS)
    def propose(self, prompt: str, answer: str) -> None:
        before = self.stores.edits.get_many(self.ids)
        with acting(Actor("proposer")):
            [edit] = self.reviewed.submit([fact(prompt, answer)])
        assert edit.status is EditStatus.PROPOSED
        assert self.stores.edits.get_many(self.ids) == before, "it is nobody's successor yet"
        self.ids.append(edit.id)

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), actor=st.sampled_from(["proposer", "another"]))
    def approve(self, data: st.DataObject, actor: str) -> None:
        edit = self.stores.edits.get(data.draw(st.sampled_from(self.ids)))
        with acting(Actor(actor)):
            if edit.status is EditStatus.PROPOSED and actor == "another":
                assert self.stores.edits.approve(edit.id).status is EditStatus.QUEUED
            else:
                with pytest.raises((ConflictError, OwnProposalError)):
                    self.stores.edits.approve(edit.id)
                assert self.stores.edits.get(edit.id) == edit

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def retract(self, data: st.DataObject) -> None:
        self.stores.edits.retract(data.draw(st.sampled_from(self.ids)))

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        edit = self.stores.edits.get(data.draw(st.sampled_from(self.ids)))
        if edit.status is EditStatus.HELD:
            assert self.stores.edits.release(edit.id).status is EditStatus.QUEUED
        else:
            with pytest.raises(ConflictError):
                self.stores.edits.release(edit.id)

    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        self.stores.registry.activate(data.draw(st.sampled_from(self.verified)))
        self.stores.edits.settle()

    @precondition(lambda self: self.run is None)
    @rule()
    def claim(self) -> None:
        self.run, self.members = self.worker.begin()
        assert one_target_each(self.members)

    @precondition(lambda self: self.run and self.version is None)
    @rule()
    def commit(self) -> None:
        assert self.run
        self.version = self.worker.commit(self.run, self.members)

    @precondition(lambda self: self.run and self.version is None)
    @rule(refund=st.booleans())
    def die(self, refund: bool) -> None:
        assert self.run
        self.stores.edits.unclaim(self.run.id, refund=refund)
        self.end(RunStatus.FAILED)

    @precondition(lambda self: self.version is not None)
    @rule(right=st.booleans())
    def publish(self, right: bool) -> None:
        assert self.run
        assert self.version is not None
        outcome = FormatOutcome(matched=right, before="", after="", finish_reason="stop")
        trained = self.stores.edits.in_status(EditStatus.TRAINED)
        self.stores.edits.record_verification(self.run.id, {edit.id: {Format.RAW: outcome} for edit in trained})
        self.stores.registry.mark_verified(self.version, run=self.run)
        self.verified.append(self.version)
        try:
            self.stores.registry.activate(self.version, run=self.run)
        except OvertakenError:
            status = RunStatus.STALE
        else:
            status = RunStatus.SUCCEEDED
            self.stores.edits.settle()
        self.stores.edits.unclaim(self.run.id, refund=True, trained_to=EditStatus.HELD)
        self.end(status)

    @precondition(lambda self: self.run is None)
    @rule()
    def learn(self) -> None:
        """The whole of it at once, or there would be few versions to move between."""
        self.claim()
        self.commit()
        self.publish(right=True)

    @precondition(lambda self: self.version is not None)
    @rule()
    def reject(self) -> None:
        assert self.run
        self.stores.edits.unclaim(self.run.id)
        self.end(RunStatus.FAILED)

    def end(self, status: RunStatus) -> None:
        assert self.run
        self.stores.runs.finish(self.run.id, status)
        self.run, self.version = None, None
        self.stores.edits.settle()
        assert not self.stores.edits.in_status(EditStatus.TRAINING)
        assert not self.stores.edits.in_status(EditStatus.TRAINED)

    @invariant()
    def the_edits_agree_with_each_other_and_with_the_pointer(self) -> None:
        assert self.stores.edits.settle() == [], "settling again changes nothing"
        self.stores.redis.delete(EditKeys().settled)
        assert self.stores.edits.settle() == [], "nor does a look at every edit"
        edits = self.stores.edits.get_many(self.ids)
        found = Counter(edit.status for edit in edits)
        assert {status: count for status, count in self.stores.edits.counts().items() if count} == found
        assert one_target_each([edit for edit in edits if edit.status in CUMULATIVE])
        pointer = self.stores.registry.active()
        assert pointer is not None
        served = {edit.id for edit in self.stores.edits.by_sequence(self.stores.registry.members(pointer.active))}
        for edit in edits:
            if edit.status is EditStatus.LIVE:
                assert edit.id in served
                assert {outcome.matched for outcome in edit.verified.values()} == {True}
            elif edit.status is EditStatus.PROPOSED:
                assert edit.id not in served
            elif edit.status is EditStatus.TRAINED:
                assert edit.version == self.version


@pytest.mark.timeout(300)
def test_whatever_comes_edits_agree_with_each_other_and_with_the_pointer(stores: Stores) -> None:
    class Bound(Lives):
        pass

    Bound.stores = stores
    run_state_machine_as_test(
        Bound,
        settings=bounds(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
