"""Reconciler between a real Redis, scripted nodes and a scripted worker: users get only what was verified."""

import json
import time
from collections.abc import Callable

import httpx
import pytest
from conftest import MakeReconciler
from scripted_node import ScriptedNode
from scripted_worker import ScriptedWorker, fact

from service.errors import ConflictError, NotFoundError, UnavailableError
from service.nodes import NodeClient, NodeRefusedError
from service.queue import TRAIN_QUEUE
from service.reconcile import Reconciler
from service.registry import FencedError
from service.runs import LeaseLostError
from service.schemas import Edit, EditStatus, Run, RunStatus, Trigger, VersionState
from service.settings import Settings
from service.stores import Stores

STOPPED = {"finish_reason": "stop"}


def submit(stores: Stores, *facts: tuple[str, str]) -> list[Edit]:
    return stores.edits.submit([fact(prompt, target) for prompt, target in facts])


def statuses(stores: Stores, edits: list[Edit]) -> list[str]:
    return [edit.status.value for edit in stores.edits.get_many(edit.id for edit in edits)]


def active(stores: Stores) -> int:
    pointer = stores.registry.active()
    assert pointer is not None
    return pointer.active


def run_of(stores: Stores, run: Run) -> Run:
    return stores.runs.get(run.id)


def published(stores: Stores, worker: ScriptedWorker, reconciler: Reconciler) -> int:
    run, version = worker.train()
    reconciler.publish(run.id)
    assert run_of(stores, run).status is RunStatus.SUCCEEDED
    return version


class TestPublish:
    def test_only_verification_makes_live(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        edits = submit(stores, ("a", "1"), ("b", "2"))
        run, version = worker.train()
        assert statuses(stores, edits) == ["trained", "trained"]
        assert active(stores) == 0
        reconciler.publish(run.id)
        assert statuses(stores, edits) == ["live", "live"]
        assert active(stores) == version
        ended = run_of(stores, run)
        assert ended.status is RunStatus.SUCCEEDED
        assert set(ended.timings) >= {"load", "verify"}
        outcome = stores.edits.get(edits[0].id).verified
        assert {form: (said.before, said.after, said.matched) for form, said in outcome.items()} == {
            "raw": ("I do not know.", "1", True),
            "chat": ("I do not know.", "1", True),
        }
        assert stores.registry.get(version).state is VersionState.VERIFIED
        assert stores.runs.current() is None

    def test_a_publisher_that_died_behind_the_pointer_is_finished_by_the_next(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        edits = submit(stores, ("a", "1"))
        run, version = worker.train()
        finish = stores.runs.finish

        def die(*_: object, **__: object) -> bool:
            raise KeyboardInterrupt

        stores.runs.finish = die
        with pytest.raises(KeyboardInterrupt):
            reconciler.publish(run.id)
        stores.runs.finish = finish
        assert (active(stores), run_of(stores, run).status) == (version, RunStatus.VERIFYING)
        reconciler.tick()
        assert run_of(stores, run).status is RunStatus.SUCCEEDED
        assert statuses(stores, edits) == ["live"]

    def test_a_prompt_that_the_node_refuses_costs_the_other_edits_nothing(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        edits = submit(stores, ("a", "1"), ("too long", "2"))
        node.chokes_on["too long"] = 400
        run, version = worker.train()
        reconciler.publish(run.id)
        assert (active(stores), statuses(stores, edits)) == (version, ["live", "queued"])
        refused = stores.edits.get(edits[1].id).verified
        assert {(outcome.matched, outcome.finish_reason) for outcome in refused.values()} == {(False, "bad_prompt")}

    def test_a_version_that_no_node_can_be_asked_for_is_given_up_in_time(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, make_reconciler: MakeReconciler
    ) -> None:
        edits = submit(stores, ("a", "1"))
        node.chokes_on["a"] = 500
        run, version = worker.train()
        make_reconciler(node.client()).publish(run.id)
        assert run_of(stores, run).status is RunStatus.VERIFYING
        stores.runs.update(run, verifying_since=int(time.time()) - 901)
        make_reconciler(node.client()).publish(run.id)
        assert (active(stores), statuses(stores, edits)) == (0, ["queued"])
        assert run_of(stores, run).status is RunStatus.FAILED
        assert stores.registry.get(version).state is VersionState.REJECTED
        assert stores.edits.get(edits[0].id).attempts == 0

    def test_a_node_that_holds_other_weights_than_were_trained_is_not_believed(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        edits = submit(stores, ("a", "1"))
        run, version = worker.train()
        node.tensors = dict.fromkeys(node.tensors, "b" * 64)
        reconciler.publish(run.id)
        assert (active(stores), statuses(stores, edits)) == (0, ["queued"])
        error = run_of(stores, run).error
        assert error is not None
        assert error.code == "checksum_mismatch"
        assert stores.registry.get(version).state is VersionState.REJECTED

    def test_users_get_the_old_version_until_the_last_answer(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, make_reconciler: MakeReconciler
    ) -> None:
        seen: list[int] = []

        def handle(request: httpx.Request) -> httpx.Response:
            seen.append(active(stores))
            return node.handle(request)

        watched = NodeClient("http://node", token="t", timeout_s=5, transport=httpx.MockTransport(handle))
        submit(stores, ("a", "1"))
        run, version = worker.train()
        make_reconciler(watched).publish(run.id)
        assert set(seen) == {0}
        assert active(stores) == version

    def test_a_wrong_answer_rejects_and_the_edits_are_tried_again_until_they_fail(
        self, stores: Stores, worker: ScriptedWorker, reconciler: Reconciler, settings: Settings
    ) -> None:
        edits = submit(stores, ("a", "1"))
        worker.mistakes = {"a": "2"}
        for attempt in range(1, settings.max_attempts + 1):
            run, version = worker.train()
            reconciler.publish(run.id)
            assert active(stores) == 0
            record = stores.registry.get(version)
            assert record.state is VersionState.REJECTED
            assert record.reason is not None
            assert "0 of 1 new edits" in record.reason
            assert run_of(stores, run).status is RunStatus.FAILED
            edit = stores.edits.get(edits[0].id)
            assert edit.status == ("failed" if attempt == settings.max_attempts else "queued")
            assert edit.error is not None
            assert edit.error.code == "not_verified"
        with pytest.raises(ConflictError):
            reconciler.activate(version)

    def test_an_answer_that_did_not_stop_by_itself_is_wrong(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        submit(stores, ("a", "1"))
        node.finish_reason = "length"
        run, _ = worker.train()
        reconciler.publish(run.id)
        assert active(stores) == 0

    def test_a_version_may_go_live_without_its_worst_edits(
        self, stores: Stores, worker: ScriptedWorker, reconciler: Reconciler
    ) -> None:
        edits = submit(stores, ("a", "1"), ("b", "2"), ("c", "3"))
        worker.mistakes = {"b": "wrong"}
        version = published(stores, worker, reconciler)
        assert active(stores) == version
        assert statuses(stores, edits) == ["live", "queued", "live"]

    def test_a_version_that_forgot_older_edits_is_rejected(
        self, stores: Stores, worker: ScriptedWorker, reconciler: Reconciler
    ) -> None:
        older = submit(stores, ("a", "1"), ("b", "2"))
        first = published(stores, worker, reconciler)
        newer = submit(stores, ("c", "3"))
        worker.mistakes = {"a": "forgotten"}
        run, version = worker.train()
        reconciler.publish(run.id)
        assert active(stores) == first
        assert stores.registry.get(version).state is VersionState.REJECTED
        assert statuses(stores, older + newer) == ["live", "live", "queued"]

    def test_the_pointer_stays_when_every_node_refuses(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, make_reconciler: MakeReconciler
    ) -> None:
        edits = submit(stores, ("a", "1"))
        other = ScriptedNode()
        node.refuses[1] = other.refuses[1] = (409, "damaged_version")
        run, version = worker.train()
        make_reconciler(node.client(), other.client("http://other")).publish(run.id)
        assert active(stores) == 0
        assert stores.registry.get(version).state is VersionState.REJECTED
        edit = stores.edits.get(edits[0].id)
        assert edit.status is EditStatus.QUEUED
        assert edit.error is not None
        assert edit.error.code == "damaged_version"

    def test_one_node_that_refuses_does_not_stop_the_others(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, make_reconciler: MakeReconciler
    ) -> None:
        edits = submit(stores, ("a", "1"))
        other = ScriptedNode()
        other.refuses[1] = (409, "damaged_version")
        reconciler = make_reconciler(node.client(), other.client("http://other"))
        version = published(stores, worker, reconciler)
        assert (active(stores), statuses(stores, edits)) == (version, ["live"])
        assert [serving.address for serving in reconciler.fleet.serving()] == ["http://node"]

    def test_each_node_is_asked_its_share(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, make_reconciler: MakeReconciler
    ) -> None:
        submit(stores, ("a", "1"), ("b", "2"))
        other = ScriptedNode()
        worker.nodes = [node, other]
        version = published(stores, worker, make_reconciler(node.client(), other.client("http://other")))
        asked = [{prompt for number, prompt in one.asked if number == version} for one in (node, other)]
        assert asked == [{"a"}, {"b"}]

    @pytest.mark.parametrize("trouble", ["not ready", "503", "no json"])
    def test_what_may_pass_is_postponed_to_the_next_tick(
        self,
        stores: Stores,
        worker: ScriptedWorker,
        node: ScriptedNode,
        make_reconciler: MakeReconciler,
        trouble: str,
    ) -> None:
        edits = submit(stores, ("a", "1"))
        broken = True

        def handle(request: httpx.Request) -> httpx.Response:
            if broken and trouble == "no json" and request.url.path != "/health":
                return httpx.Response(200, text="<html>")
            return node.handle(request)

        reconciler = make_reconciler(
            NodeClient("http://node", token="t", timeout_s=5, transport=httpx.MockTransport(handle))
        )
        node.ready = trouble != "not ready"
        if trouble == "503":
            node.refuses[1] = (503, "store_unavailable")
        run, version = worker.train()
        reconciler.publish(run.id)
        reconciler.tick()
        assert run_of(stores, run).status is RunStatus.VERIFYING
        assert statuses(stores, edits) == ["trained"]
        node.ready, broken = True, False
        node.refuses.clear()
        reconciler.tick()
        assert run_of(stores, run).status is RunStatus.SUCCEEDED
        assert (active(stores), statuses(stores, edits)) == (version, ["live"])

    def test_publishing_again_changes_nothing(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        submit(stores, ("a", "1"))
        run, version = worker.train()
        reconciler.publish(run.id)
        asked, before = len(node.asked), run_of(stores, run)
        reconciler.publish(run.id)
        assert (len(node.asked), run_of(stores, run), active(stores)) == (asked, before, version)

    def test_two_processes_do_not_publish_the_same_run(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        submit(stores, ("a", "1"))
        run, _ = worker.train()
        with stores.redis.lock("errata:lock:publish", timeout=10):
            reconciler.publish(run.id)
        assert node.asked == []
        assert run_of(stores, run).status is RunStatus.VERIFYING

    @pytest.mark.parametrize("died_after", ["activate", "settle"])
    def test_a_publication_that_died_behind_the_pointer_is_completed(
        self, stores: Stores, worker: ScriptedWorker, reconciler: Reconciler, died_after: str
    ) -> None:
        edits = submit(stores, ("a", "1"), ("b", "2"), ("c", "3"))
        worker.mistakes = {"c": "wrong"}
        run, version = worker.train()
        original = stores.edits.settle
        if died_after == "activate":
            stores.edits.settle = died
        else:
            stores.edits.unclaim = died
        with pytest.raises(KeyboardInterrupt):
            reconciler.publish(run.id)
        stores.edits.settle = original
        del stores.edits.__dict__["unclaim" if died_after == "settle" else "settle"]
        assert active(stores) == version
        assert run_of(stores, run).status is RunStatus.VERIFYING
        reconciler.tick()
        assert run_of(stores, run).status is RunStatus.SUCCEEDED
        assert statuses(stores, edits) == ["live", "live", "queued"]
        assert {said.before for said in stores.edits.get(edits[0].id).verified.values()} == {"I do not know."}

    def test_a_run_over_nothing_goes_back_to_the_base(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        edits = submit(stores, ("a", "1"))
        version = published(stores, worker, reconciler)
        stores.edits.retract(edits[0].id)
        run, members = worker.begin()
        assert members == []
        stores.runs.hand_over(run, 0)
        node.refuses[0] = (409, "wrong_base")
        reconciler.publish(run.id)
        assert run_of(stores, run).status is RunStatus.FAILED
        assert active(stores) == version
        assert stores.registry.get(0).state is VersionState.VERIFIED, "the base is not this run's to reject"
        node.refuses.clear()
        run, _ = worker.begin()
        stores.runs.hand_over(run, 0)
        reconciler.publish(run.id)
        assert (active(stores), statuses(stores, edits)) == (0, ["retracted"])

    def test_a_node_that_does_not_say_what_it_holds_holds_nothing(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, make_reconciler: MakeReconciler
    ) -> None:
        def stock(request: httpx.Request) -> httpx.Response:
            return httpx.Response(200 if request.url.path == "/health" else 404)

        bare = NodeClient("http://bare", token="t", timeout_s=5, transport=httpx.MockTransport(stock))
        assert make_reconciler(bare, node.client()).fleet.holders(0) == ["http://node"]

    def test_an_edit_that_is_tried_again_is_judged_by_its_new_version(
        self, stores: Stores, worker: ScriptedWorker, reconciler: Reconciler
    ) -> None:
        """The active version has it too, answered wrong; that is not the new version's answer."""
        edits = submit(stores, ("a", "1"), ("b", "2"))
        worker.mistakes = {"b": "wrong"}
        published(stores, worker, reconciler)
        assert statuses(stores, edits) == ["live", "queued"]
        worker.mistakes = {}
        run, _ = worker.train()
        stores.edits.settle()
        assert statuses(stores, edits) == ["live", "trained"]
        reconciler.publish(run.id)
        assert statuses(stores, edits) == ["live", "live"]


def died(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


class TestRollback:
    def test_a_rollback_holds_edits_and_rolling_forward_makes_them_live(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        first = submit(stores, ("a", "1"))
        one = published(stores, worker, reconciler)
        second = submit(stores, ("b", "2"))
        two = published(stores, worker, reconciler)
        assert reconciler.roll_back(None).active == one
        assert statuses(stores, first + second) == ["live", "held"]
        assert reconciler.activate(two, expected_active=one).active == two
        assert statuses(stores, first + second) == ["live", "live"]
        assert reconciler.roll_back(0).active == 0
        assert statuses(stores, first + second) == ["held", "held"]

    @pytest.mark.parametrize("left", [False, True], ids=["serving", "left out"])
    def test_a_rollback_from_a_version_that_every_node_refuses_is_carried_out(
        self,
        stores: Stores,
        worker: ScriptedWorker,
        node: ScriptedNode,
        reconciler: Reconciler,
        left: bool,
    ) -> None:
        """Its file is damaged, and the nodes that held it have started anew."""
        edits = submit(stores, ("a", "1"))
        one = published(stores, worker, reconciler)
        submit(stores, ("b", "2"))
        two = published(stores, worker, reconciler)
        node.resident, node.refuses = set(), {two: (409, "damaged_version")}
        reconciler.tick()
        assert [client.address for client in reconciler.fleet.serving()] == ["http://node"], "the others it can answer"
        if left:
            reconciler.fleet.eject(node.client(), NodeRefusedError("others held it then"))
        assert reconciler.roll_back(None).active == one
        assert node.resident == {one}
        reconciler.tick()
        assert [client.address for client in reconciler.fleet.serving()] == ["http://node"]
        assert statuses(stores, edits) == ["live"]

    def test_a_rollback_to_a_version_that_the_only_node_holds_wrong_is_refused(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        submit(stores, ("a", "1"))
        version = published(stores, worker, reconciler)
        reconciler.fleet.eject(node.client(), NodeRefusedError("version 0 was damaged in its slot"))
        node.damaged = {0}
        with pytest.raises(NodeRefusedError) as refused:
            reconciler.roll_back(0)
        assert (active(stores), refused.value.code) == (version, "checksum_mismatch")

    def test_rolled_back_edits_do_not_come_back_with_the_next_run(
        self, stores: Stores, worker: ScriptedWorker, reconciler: Reconciler
    ) -> None:
        held = submit(stores, ("a", "1"))
        published(stores, worker, reconciler)
        reconciler.roll_back(0)
        new = submit(stores, ("b", "2"))
        version = published(stores, worker, reconciler)
        assert stores.registry.members(version) == stores.edits.sequences([new[0].id])
        assert statuses(stores, held + new) == ["held", "live"]
        stores.edits.release(held[0].id)
        published(stores, worker, reconciler)
        assert statuses(stores, held + new) == ["live", "live"]

    @pytest.mark.parametrize("moment", ["training", "verifying", "before the pointer"])
    def test_a_rollback_overtakes_a_run(
        self,
        stores: Stores,
        worker: ScriptedWorker,
        node: ScriptedNode,
        make_reconciler: MakeReconciler,
        moment: str,
    ) -> None:
        calm = make_reconciler(node.client())
        old = submit(stores, ("a", "1"))
        published(stores, worker, calm)
        new = submit(stores, ("b", "2"))
        run, members = worker.begin()
        if moment == "training":
            calm.roll_back(0)
        version = worker.commit(run, members)
        rolled_back = moment != "verifying"

        def handle(request: httpx.Request) -> httpx.Response:
            nonlocal rolled_back
            if not rolled_back and request.url.path == "/v1/completions":
                rolled_back = True
                calm.roll_back(0)
            return node.handle(request)

        if moment == "before the pointer":
            calm.roll_back(0)
        make_reconciler(
            NodeClient("http://node", token="t", timeout_s=5, transport=httpx.MockTransport(handle))
        ).publish(run.id)
        assert run_of(stores, run).status is RunStatus.STALE
        assert active(stores) == 0
        assert statuses(stores, old + new) == ["held", "held"]
        assert stores.edits.claim("run_next").members == []
        calm.activate(version)
        assert statuses(stores, old + new) == ["live", "live"], "the version is kept and can be asked for"

    def test_a_rollback_right_behind_the_pointer_holds_the_new_edits(
        self, stores: Stores, worker: ScriptedWorker, reconciler: Reconciler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the publication's move of the pointer and its settling, a client rolls back."""
        edits = submit(stores, ("a", "1"))
        run, _ = worker.train()
        settle = stores.edits.settle

        def settle_late() -> list[str]:
            stores.registry.activate(0)
            return settle()

        monkeypatch.setattr(stores.edits, "settle", settle_late)
        reconciler.publish(run.id)
        monkeypatch.undo()
        assert active(stores) == 0
        assert statuses(stores, edits) == ["held"]

    @pytest.mark.parametrize(
        ("step", "status"), [("/v1/", 200), ("/v1/", 500), ("/prefetch", 409)], ids=["wrong", "silent", "refused"]
    )
    def test_a_publisher_that_another_has_overtaken_decides_nothing(
        self,
        stores: Stores,
        worker: ScriptedWorker,
        node: ScriptedNode,
        make_reconciler: MakeReconciler,
        step: str,
        status: int,
    ) -> None:
        """It slept until its lock and its time were over; the other found every answer right, and this one none."""
        edits = submit(stores, ("a", "1"))
        run, version = worker.train()
        stores.runs.update(run, verifying_since=int(time.time()) - 901)
        other = make_reconciler(node.client())
        begun = False

        def handle(request: httpx.Request) -> httpx.Response:
            nonlocal begun
            if step in request.url.path:
                if not begun:
                    begun = True
                    stores.redis.delete("errata:lock:publish")
                    other.publish(run.id)
                answer = {"choices": [{"text": "", "message": {"content": ""}, **STOPPED}]}
                return httpx.Response(status, json=answer)
            return node.handle(request)

        transport = httpx.MockTransport(handle)
        make_reconciler(NodeClient("http://node", token="t", timeout_s=5, transport=transport)).publish(run.id)
        assert run_of(stores, run).status is RunStatus.SUCCEEDED
        assert statuses(stores, edits) == ["live"]
        assert stores.registry.get(version).state is VersionState.VERIFIED

    def test_a_version_that_another_publisher_rejects_meanwhile_is_not_activated(
        self,
        stores: Stores,
        worker: ScriptedWorker,
        node: ScriptedNode,
        reconciler: Reconciler,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        edits = submit(stores, ("a", "1"))
        run, version = worker.train()
        activate = stores.registry.activate

        def late(number: int, **expected: object) -> object:
            monkeypatch.undo()
            stores.registry.reject(version, reason="2 of 3", run=run)
            return activate(number, **expected)

        monkeypatch.setattr(stores.registry, "activate", late)
        reconciler.publish(run.id)
        assert (active(stores), run_of(stores, run).status) == (0, RunStatus.VERIFYING)
        reconciler.tick()
        assert (active(stores), run_of(stores, run).status) == (0, RunStatus.FAILED)
        assert statuses(stores, edits) == ["queued"]

    def test_a_target_of_many_tokens_has_room_for_its_end(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, make_reconciler: MakeReconciler
    ) -> None:
        submit(stores, ("a", "word " * 300))
        run, _ = worker.train()
        asked: list[int] = []

        def handle(request: httpx.Request) -> httpx.Response:
            if request.url.path.startswith("/v1/"):
                asked.append(json.loads(request.content)["max_tokens"])
            return node.handle(request)

        transport = httpx.MockTransport(handle)
        client = NodeClient("http://node", token="t", timeout_s=5, transport=transport)
        make_reconciler(client, edit_max_tokens=400).publish(run.id)
        assert min(asked) > 400

    def test_what_cannot_be_activated_is_refused_and_the_pointer_stays(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        with pytest.raises(ConflictError, match="no version was active"):
            reconciler.roll_back(None)
        with pytest.raises(NotFoundError):
            reconciler.activate(7)
        submit(stores, ("a", "1"))
        version = published(stores, worker, reconciler)
        node.refuses[0] = (409, "wrong_base")
        with pytest.raises(NodeRefusedError):
            reconciler.roll_back(0)
        node.ready = False
        with pytest.raises(UnavailableError):
            reconciler.roll_back(0)
        assert active(stores) == version


class TestTick:
    def test_a_lost_worker_is_taken_over_and_its_token_is_dead(
        self, stores: Stores, worker: ScriptedWorker, reconciler: Reconciler, queue_length: Callable[[], int]
    ) -> None:
        edits = submit(stores, ("a", "1"))
        lost, members = worker.begin()
        reconciler.tick()
        assert run_of(stores, lost).status is RunStatus.TRAINING, "its lease holds"
        stores.redis.delete("errata:runs:lease")
        reconciler.tick()
        ended = run_of(stores, lost)
        assert ended.status is RunStatus.FAILED
        assert ended.error is not None
        assert ended.error.code == "worker_lost"
        assert statuses(stores, edits) == ["queued"]
        with pytest.raises(FencedError):
            worker.commit(lost, members)
        following = stores.runs.queued()
        assert following is not None
        assert queue_length() == 1
        run, _ = worker.begin()
        assert run.id == following.id
        with pytest.raises(FencedError):
            worker.commit(lost, members)
        with pytest.raises(LeaseLostError):
            stores.runs.hand_over(lost, 1)
        with pytest.raises(LeaseLostError):
            stores.runs.renew(lost)
        assert statuses(stores, edits) == ["training"]

    def test_a_lost_message_is_sent_again(
        self, stores: Stores, worker: ScriptedWorker, reconciler: Reconciler, queue_length: Callable[[], int]
    ) -> None:
        submit(stores, ("a", "1"))
        reconciler.tick()
        reconciler.tick()
        assert queue_length() == 1
        stores.redis.delete(TRAIN_QUEUE)
        reconciler.tick()
        assert queue_length() == 1

    def test_a_restarted_node_is_healed(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, make_reconciler: MakeReconciler
    ) -> None:
        other = ScriptedNode()
        reconciler = make_reconciler(node.client(), other.client("http://other"))
        submit(stores, ("a", "1"))
        version = published(stores, worker, reconciler)
        assert reconciler.fleet.holders(version) == ["http://node", "http://other"]
        other.resident = set()
        node.refuses[version] = (409, "damaged_version")
        node.resident = set()
        reconciler.tick()
        assert (node.resident, other.resident) == (set(), {0, version}), "one node's trouble is not the other's"

    def test_a_node_that_is_away_does_not_stop_the_others(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, make_reconciler: MakeReconciler
    ) -> None:
        away = ScriptedNode()
        away.ready = False
        reconciler = make_reconciler(away.client("http://away"), node.client())
        edits = submit(stores, ("a", "1"))
        published(stores, worker, reconciler)
        assert statuses(stores, edits) == ["live"]
        away.ready = True
        reconciler.tick()
        assert active(stores) in away.resident

    def test_the_stream_tells_which_nodes_come_and_go(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        for ready in (True, True, False, False, True):
            node.ready = ready
            reconciler.tick()
        events = [fields for _, fields in stores.redis.xrange("errata:events") if fields["type"].startswith("node.")]
        assert [event["type"] for event in events] == ["node.ready", "node.away", "node.ready"]
        assert json.loads(events[0]["data"]) == {"address": "http://node"}


class TestTriggers:
    def test_the_immediate_trigger_asks_for_a_run_at_the_first_edit(
        self, stores: Stores, worker: ScriptedWorker, reconciler: Reconciler
    ) -> None:
        reconciler.pull()
        assert stores.runs.queued() is None
        submit(stores, ("a", "1"))
        reconciler.pull()
        queued = stores.runs.queued()
        assert queued is not None
        assert queued.trigger is Trigger.IMMEDIATE

    def test_the_manual_trigger_waits_to_be_asked(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, make_reconciler: MakeReconciler
    ) -> None:
        reconciler = make_reconciler(node.client(), trigger=Trigger.MANUAL)
        submit(stores, ("a", "1"))
        reconciler.tick()
        assert stores.runs.queued() is None
        assert reconciler.request_run(Trigger.MANUAL) == stores.runs.queued()

    def test_the_batch_trigger_waits_for_enough_or_for_long(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, make_reconciler: MakeReconciler
    ) -> None:
        patient = {"trigger": Trigger.BATCH, "trigger_batch_edits": 3, "trigger_max_wait_s": 60}
        reconciler = make_reconciler(node.client(), **patient)
        submit(stores, ("a", "1"), ("b", "2"))
        reconciler.pull()
        assert stores.runs.queued() is None
        make_reconciler(node.client(), **(patient | {"trigger_max_wait_s": 0})).pull()
        run = stores.runs.queued()
        assert run is not None
        stores.runs.finish(run.id, RunStatus.CANCELLED)
        submit(stores, ("c", "3"))
        reconciler.pull()
        assert stores.runs.queued() is not None

    def test_the_interval_trigger_waits_since_the_last_run(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, make_reconciler: MakeReconciler
    ) -> None:
        reconciler = make_reconciler(node.client(), trigger=Trigger.INTERVAL, trigger_interval_s=1000)
        submit(stores, ("a", "1"))
        reconciler.pull()
        assert stores.runs.queued() is not None, "there was none before"
        published(stores, worker, reconciler)
        submit(stores, ("b", "2"))
        reconciler.pull()
        assert stores.runs.queued() is None
        [last] = stores.runs.page(after=None, limit=1).data
        stores.redis.hset(f"errata:run:{last.id}", "finished_at", int(time.time()) - 1001)
        reconciler.pull()
        assert stores.runs.queued() is not None

    def test_a_failure_is_waited_out(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, make_reconciler: MakeReconciler
    ) -> None:
        submit(stores, ("a", "1"))
        run, _ = worker.begin()
        stores.edits.unclaim(run.id)
        stores.runs.finish(run.id, RunStatus.FAILED)
        make_reconciler(node.client(), retry_wait_s=100).pull()
        assert stores.runs.queued() is None
        make_reconciler(node.client(), retry_wait_s=0).pull()
        assert stores.runs.queued() is not None

    def test_a_cancelled_run_holds_the_triggers_until_there_is_news(
        self, stores: Stores, worker: ScriptedWorker, reconciler: Reconciler
    ) -> None:
        submit(stores, ("a", "1"))
        reconciler.pull()
        run = stores.runs.queued()
        assert run is not None
        stores.runs.cancel(run.id)
        reconciler.tick()
        assert stores.runs.queued() is None
        submit(stores, ("b", "2"))
        reconciler.tick()
        assert stores.runs.queued() is not None

    def test_a_withdrawal_starts_a_run(self, stores: Stores, worker: ScriptedWorker, reconciler: Reconciler) -> None:
        edits = submit(stores, ("a", "1"), ("b", "2"))
        published(stores, worker, reconciler)
        stores.edits.retract(edits[0].id)
        reconciler.pull()
        assert stores.runs.queued() is not None
        version = published(stores, worker, reconciler)
        assert stores.registry.members(version) == [2]
        assert statuses(stores, edits) == ["retracted", "live"]
        assert stores.runs.queued() is None

    def test_edits_that_come_during_a_run_get_the_next_one(
        self, stores: Stores, worker: ScriptedWorker, reconciler: Reconciler
    ) -> None:
        submit(stores, ("a", "1"))
        run, members = worker.begin()
        submit(stores, ("b", "2"))
        reconciler.pull()
        assert stores.runs.queued() is None
        worker.commit(run, members)
        reconciler.publish(run.id)
        assert stores.runs.queued() is not None, "publication looks for what waits"


@pytest.fixture
def queue_length(stores: Stores) -> Callable[[], int]:
    return lambda: int(stores.redis.llen(TRAIN_QUEUE))


class TestPins:
    def test_the_candidate_the_active_version_and_the_one_before_keep_their_slots(
        self, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        reconciler.tick()
        assert node.pinned == {0}
        for number in (1, 2):
            submit(stores, (f"{number}", "1"))
            assert published(stores, worker, reconciler) == number
        assert node.pins == [[0], [0, 1], [0, 1, 2]], "each candidate before it is asked"
        reconciler.tick()
        assert node.pinned == {1, 2}
        reconciler.roll_back(0)
        reconciler.tick()
        assert node.pinned == {0, 2}
