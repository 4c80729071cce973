"""A canary between a real Redis, the real application and a scripted node: who gets it, and what becomes of it."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from redis_server import RedisServer
from scripted_clock import Clock
from scripted_node import ScriptedNode, listening
from scripted_worker import ScriptedWorker, fact
from service_process import assert_error, serving
from waiting import until

from service import publication
from service.api_keys import Scope
from service.audit import AuditLog
from service.ejection import ejections
from service.errors import ConflictError
from service.gateway.pool import NodePool
from service.metrics.catalogue import ACTIVATIONS, CANARIES_ENDED, VERSIONS_JUDGED
from service.metrics.kept import named
from service.publication import Publisher
from service.queue import TaskQueue
from service.reconcile import Reconciler
from service.registry import NotVerifiedError, OvertakenError
from service.runs import LeaseLostError
from service.schemas import (
    Edit,
    EditStatus,
    Format,
    FormatOutcome,
    Run,
    RunStatus,
    Trigger,
    VersionRecord,
    VersionState,
)
from service.settings import Settings
from service.stores import Stores
from service.tracing import span
from service.verification import Verdict

pytestmark = pytest.mark.timeout(120)

ASK = {"model": "errata", "prompt": "a"}
LASTS_S = 60.0
LASTS_REQUESTS = 100


class Stage:
    """A canary and what is around it: version 1 is active, its run's successor has made the next one."""

    def __init__(self, stores: Stores, queue: TaskQueue, settings: Settings, node: ScriptedNode) -> None:
        self.stores = stores
        self.node = node
        self.clock = Clock()
        self.clock.now = time.time()
        self._queue = queue
        self._settings = settings.model_copy(
            # What the node is asked here is counted.
            update={
                "canary_share": 0.5,
                "canary_s": LASTS_S,
                "canary_requests": LASTS_REQUESTS,
                "answer_check_s": 0,
            }
        )
        self.worker = ScriptedWorker(stores, [node])
        self.worker.register_base()
        self.restart()

    def restart(self, **changed: object) -> None:
        """A control worker that knows nothing but what is in Redis."""
        settings = self._settings.model_copy(update=changed)
        self.control = Reconciler(self.stores, [self.node.client()], self._queue, settings, clock=self.clock)

    def submit(self, prompt: str, target: str) -> Edit:
        return self.stores.edits.submit([fact(prompt, target)])[0]

    def served_since_long(self, prompt: str, target: str) -> int:
        """A version that became active without a canary."""
        self.submit(prompt, target)
        run, version = self.worker.train()
        self.restart(canary_share=0.0)
        self.control.publish(run.id)
        self.restart()
        assert self.pointer() == (version, None)
        return version

    def candidate(self, prompt: str, target: str) -> tuple[Edit, Run, int]:
        """A version that has just become the canary."""
        edit = self.submit(prompt, target)
        run, version = self.worker.train()
        self.control.publish(run.id)
        assert self.pointer()[1] == version
        canary = self.stores.canaries.current()
        assert canary is not None
        self.clock.now = float(canary.since)
        return edit, run, version

    def pointer(self) -> tuple[int, int | None]:
        pointer = self.stores.registry.active()
        assert pointer is not None
        return pointer.active, pointer.canary

    def status(self, edit: Edit) -> str:
        return self.stores.edits.get(edit.id).status.value

    def run(self, run: Run) -> RunStatus:
        return self.stores.runs.get(run.id).status

    def said(self) -> list[tuple[str, dict[str, object]]]:
        """Events of versions, the committed ones aside."""
        rows = self.stores.redis.xrange("errata:events")
        found = [(fields["type"], json.loads(fields["data"])) for _, fields in rows]
        return [(name, data) for name, data in found if name.startswith("version.") and name != "version.committed"]

    def audited(self) -> list[str]:
        entries = AuditLog(self.stores.redis).page(after=None, limit=100).data
        return [entry.action for entry in reversed(entries) if entry.action.startswith("version.")]

    def ended(self) -> dict[str, int]:
        kept = self.stores.measures.kept()
        names = {outcome: named(CANARIES_ENDED, outcome) for outcome in CANARIES_ENDED.kept}
        return {outcome: int(kept[name]) for outcome, name in names.items() if name in kept}

    def activations(self) -> int:
        return int(self.stores.measures.kept()[named(ACTIVATIONS)])


@pytest.fixture
def stage(stores: Stores, queue: TaskQueue, settings: Settings, node: ScriptedNode) -> Stage:
    return Stage(stores, queue, settings, node)


class Gateway:
    """The application over the stage's node."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def ask(self, model: str = "errata", **headers: object) -> httpx.Response:
        named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
        for _ in range(20):
            response = self.client.post("/v1/completions", json={**ASK, "model": model}, headers=named)
            # A machine that is busy with other work may be too slow for the gateway's wait for a connection.
            if "no_ready_node" not in response.text:
                break
        return response


Gateways = Callable[..., AbstractContextManager[Gateway]]


@pytest.fixture
def gateway(stage: Stage, redis_server: RedisServer, tokenizer_folder: Path) -> Gateways:
    """Starts the application with settings by name."""

    @contextmanager
    def started(**changed: object) -> Iterator[Gateway]:
        with listening(stage.node) as address:
            settings = {"redis_url": redis_server.url, "model": str(tokenizer_folder), "nodes": address, **changed}
            with (
                serving(Settings.model_validate(settings)) as url,
                httpx.Client(base_url=url, timeout=30) as client,
            ):
                yield Gateway(client)

    return started


def answer_of(response: httpx.Response) -> tuple[int, str]:
    """The label and what was said under it."""
    assert response.status_code == 200, response.text
    return int(response.headers["x-errata-version"]), response.json()["choices"][0]["text"]


def counts(stage: Stage) -> tuple[int, int, int, int]:
    """(ok, errors) of the canary and of the active version."""
    canary = stage.stores.canaries.current()
    assert canary is not None
    return canary.of_canary.ok, canary.of_canary.errors, canary.of_active.ok, canary.of_active.errors


class TestTraffic:
    def test_a_share_of_the_requests_gets_the_canary_under_its_own_name(self, stage: Stage, gateway: Gateways) -> None:
        one = stage.served_since_long("a", "old")
        _, _, two = stage.candidate("a", "new")
        random.seed(22)
        with gateway(canary_share=0.25) as served:
            answers = Counter(answer_of(served.ask()) for _ in range(120))
            assert set(answers) == {(one, "old"), (two, "new")}
            assert answers[two, "new"] / 120 == pytest.approx(0.25, abs=0.1)
            assert answer_of(served.ask(f"errata@{one}")) == (one, "old")
            assert answer_of(served.ask(f"errata@{two}")) == (two, "new")
        assert counts(stage)[::2] == (answers[two, "new"], answers[one, "old"]), "those of the alias"

    def test_named_keys_get_the_canary_and_others_do_not(self, stage: Stage, gateway: Gateways) -> None:
        one = stage.served_since_long("a", "old")
        _, _, two = stage.candidate("a", "new")
        keys = {name: stage.stores.keys.create(name, [Scope.INFER]).key for name in ("tester", "other")}
        options = {"canary_keys": "nobody,tester", "auth": "required"}
        with gateway(**options) as served:
            for _ in range(5):
                assert answer_of(served.ask(authorization=f"Bearer {keys['tester']}")) == (two, "new")
                assert answer_of(served.ask(authorization=f"Bearer {keys['other']}")) == (one, "old")
            named = answer_of(served.ask(f"errata@{one}", authorization=f"Bearer {keys['tester']}"))
            assert named == (one, "old"), "who names a version gets it"
            own = {"x_errata_min_version": two}
            assert answer_of(served.ask(authorization=f"Bearer {keys['tester']}", **own)) == (two, "new")
            refused = served.ask(authorization=f"Bearer {keys['other']}", **own)
            assert_error(refused, 412, code="version_not_reached")

    def test_a_minimum_version_holds_and_is_not_reached_by_luck(self, stage: Stage, gateway: Gateways) -> None:
        one = stage.served_since_long("a", "old")
        _, _, two = stage.candidate("a", "new")
        with gateway(canary_share=1) as served:
            assert answer_of(served.ask(x_errata_min_version=one)) == (two, "new")
            early = served.ask(x_errata_min_version=two)
            assert_error(early, 412, code="version_not_reached")
            assert early.headers["x-errata-version"] == str(one)
            stage.control.activate(two)
            assert answer_of(served.ask(x_errata_min_version=two)) == (two, "new")

    def test_what_the_gateway_refuses_by_itself_or_the_client_did_wrong_is_not_counted(
        self, stage: Stage, gateway: Gateways, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage.served_since_long("a", "old")
        stage.candidate("a", "new")
        stage.node.chokes_on = {"a": 400}
        with gateway(canary_share=1) as served:
            assert_error(served.ask(), 400, code="bad_prompt")
            monkeypatch.setattr(NodePool, "busy", lambda _: 10_000)
            assert_error(served.ask(), 429, code="too_busy")
        assert counts(stage) == (0, 0, 0, 0), "a service that stops has told all"

    def test_a_canary_is_shown_while_it_is_one(self, stage: Stage, gateway: Gateways) -> None:
        one = stage.served_since_long("a", "old")
        edit, run, two = stage.candidate("a", "new")
        with gateway(canary_share=1) as served:
            answer_of(served.ask())
            until(lambda: counts(stage)[0] == 1)
            client = served.client
            listed = {version["version"]: version for version in client.get("/versions").json()["data"]}
            assert [listed[number]["canary"] for number in (0, one)] == [None, None]
            assert listed[two]["canary"]["of_canary"] == {"ok": 1, "errors": 0}
            assert listed[two]["canary"]["version"] == two
            assert (listed[two]["active"], listed[two]["state"]) == (False, "verified")
            assert client.get(f"/versions/{two}").json()["canary"] == listed[two]["canary"]
            assert client.get("/health/ready").json()["canary"] == two
            assert client.get(f"/runs/{run.id}").json()["phase"] == "canary"
            assert client.get(f"/edits/{edit.id}/status").json()["progress"]["phase"] == "canary"
            measured = client.get("/metrics").text
            assert f"errata_canary_version {two}.0" in measured
            assert 'errata_canary_requests{by="canary",outcome="ok"} 1.0' in measured
            assert client.post(f"/versions/{one}/activate").json()["canary"] is None
            assert client.get(f"/versions/{two}").json()["canary"] is None
            assert client.get("/health/ready").json()["canary"] is None
            assert f"errata_canary_version {two}" not in client.get("/metrics").text


class TestPromotion:
    def test_a_canary_is_promoted_after_enough_requests(self, stage: Stage, gateway: Gateways) -> None:
        one = stage.served_since_long("a", "old")
        edit, run, two = stage.candidate("b", "new")
        assert (stage.status(edit), stage.run(run)) == ("trained", RunStatus.VERIFYING)
        stage.restart(canary_requests=5)
        with gateway(canary_share=1) as served:
            for _ in range(4):
                served.ask()
            until(lambda: counts(stage)[0] == 4)
            stage.control.tick()
            assert stage.pointer() == (one, two)
            served.ask()
            until(lambda: counts(stage)[0] == 5)
        stage.control.tick()
        assert stage.pointer() == (two, None)
        assert (stage.status(edit), stage.run(run)) == ("live", RunStatus.SUCCEEDED)
        assert stage.stores.canaries.current() is None
        assert stage.said()[-2:] == [
            ("version.canary", {"version": two, "active": one}),
            ("version.activated", {"version": two, "previous": one}),
        ]
        assert stage.audited()[-2:] == ["version.canary", "version.activated"]
        assert stage.ended() == {"promoted": 1}
        assert stage.stores.measures.kept()[named(VERSIONS_JUDGED, "verified")] == 2, "each version once"

    def test_without_any_traffic_verification_decides_in_bounded_time(self, stage: Stage) -> None:
        one = stage.served_since_long("a", "old")
        edit, _, two = stage.candidate("b", "new")
        stage.clock.now += LASTS_S - 2
        stage.control.tick()
        assert stage.pointer() == (one, two)
        stage.clock.now += 2
        stage.control.tick()
        assert stage.pointer() == (two, None)
        assert stage.status(edit) == "live"

    def test_a_promotion_is_a_span_when_its_time_has_come_and_none_before(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage.served_since_long("a", "old")
        stage.candidate("b", "new")
        spans = []

        def noted(name: str, **attributes: object) -> AbstractContextManager[object]:
            spans.append(name)
            return span(name, **attributes)

        monkeypatch.setattr(publication, "span", noted)
        stage.control.tick()
        assert spans == []
        stage.clock.now += LASTS_S
        stage.control.tick()
        assert spans == ["publish", "load", "verify", "activate"]

    def test_without_the_settings_a_version_is_active_at_once(self, stage: Stage) -> None:
        stage.served_since_long("a", "old")
        assert "version.canary" not in [name for name, _ in stage.said()]
        _, run, two = stage.candidate("b", "new")
        stage.restart(canary_share=0.0)
        stage.control.tick()
        assert stage.pointer() == (two, None), "switched off in the middle"
        assert stage.run(run) is RunStatus.SUCCEEDED

    def test_the_base_becomes_active_without_a_canary(self, stage: Stage) -> None:
        stage.served_since_long("a", "old")
        [edit] = stage.stores.edits.in_status(EditStatus.LIVE)
        stage.stores.edits.retract(edit.id)
        run, members = stage.worker.begin()
        assert members == []
        stage.stores.runs.hand_over(run, 0)
        stage.control.publish(run.id)
        assert stage.pointer() == (0, None)
        assert stage.status(edit) == "retracted"

    def test_the_next_run_waits_for_the_canary(self, stage: Stage) -> None:
        stage.served_since_long("a", "old")
        _, _, two = stage.candidate("b", "new")
        later = stage.submit("c", "newer")
        stage.control.tick()
        assert stage.stores.runs.queued() is None
        waiting, _ = stage.stores.runs.request(Trigger.MANUAL)
        assert stage.stores.runs.start(waiting.id) is None
        stage.clock.now += LASTS_S
        stage.control.tick()
        assert stage.pointer() == (two, None)
        run, three = stage.worker.train()
        assert run.parent == two
        stage.control.publish(run.id)
        assert stage.pointer() == (two, three)
        assert stage.status(later) == "trained"
        assert counts(stage) == (0, 0, 0, 0)


class TestWithdrawal:
    def test_a_canary_is_withdrawn_for_its_errors(self, stage: Stage, gateway: Gateways) -> None:
        one = stage.served_since_long("a", "old")
        edit, run, two = stage.candidate("a", "new")
        random.seed(22)
        with gateway(canary_share=0.5) as served:
            stage.node.fails = {two}
            answered = Counter((response := served.ask()).headers["x-errata-version"] for _ in range(30))
            assert_error(response if response.status_code != 200 else failed(served), 503)
            until(lambda: sum(counts(stage)) >= 30)
            ok, errors, active_ok, active_errors = counts(stage)
            assert ok == 0
            assert errors >= answered[str(two)] > 2
            assert active_ok >= answered[str(one)] > 2
            stage.control.tick()
            assert stage.pointer() == (one, None)
            assert {answer_of(served.ask()) for _ in range(20)} == {(one, "old")}
            assert_error(served.ask(f"errata@{two}"), 404, code="model_not_found")
        record = stage.stores.registry.get(two)
        assert record.state is VersionState.REJECTED
        assert record.reason is not None
        assert f"{errors} of {errors} requests failed as a canary, {active_errors} of " in record.reason
        again = stage.stores.edits.get(edit.id)
        assert again.error is not None
        assert (again.status.value, again.attempts, again.error.code) == ("queued", 1, "canary_failed")
        assert stage.run(run) is RunStatus.FAILED
        assert stage.said()[-1] == ("version.withdrawn", {"version": two, "reason": record.reason})
        assert stage.audited()[-1] == "version.withdrawn"
        assert stage.ended() == {"withdrawn": 1}
        with pytest.raises(ConflictError, match="rejected"):
            stage.control.activate(two)

    def test_a_canary_is_not_withdrawn_for_errors_that_the_active_version_has_too(
        self, stage: Stage, gateway: Gateways
    ) -> None:
        one = stage.served_since_long("a", "old")
        _, _, two = stage.candidate("b", "new")
        stage.stores.canaries.count(two, {"canary_errors": 10, "active_errors": 50})
        stage.control.tick()
        assert stage.pointer() == (one, two)

    def test_a_canary_that_answers_wrong_at_its_end_is_withdrawn(self, stage: Stage) -> None:
        one = stage.served_since_long("a", "old")
        edit, run, two = stage.candidate("b", "new")
        stage.stores.canaries.count(two, {"canary_ok": LASTS_REQUESTS})
        stage.node.teach(two, {"a": "old", "b": "something else"})
        stage.control.tick()
        assert stage.pointer() == (one, None)
        assert stage.stores.registry.get(two).state is VersionState.REJECTED
        again = stage.stores.edits.get(edit.id)
        assert again.error is not None
        assert (again.status.value, again.error.code) == ("queued", "not_verified")
        assert stage.run(run) is RunStatus.FAILED

    def test_a_canary_of_which_the_node_holds_other_bits_at_its_end_is_withdrawn(self, stage: Stage) -> None:
        one = stage.served_since_long("a", "old")
        _, run, two = stage.candidate("b", "new")
        stage.node.damaged = {two}
        stage.clock.now += LASTS_S
        stage.control.tick()
        assert stage.pointer() == (one, None)
        assert stage.run(run) is RunStatus.FAILED

    def test_a_version_that_fails_its_first_verification_is_never_a_canary(self, stage: Stage) -> None:
        one = stage.served_since_long("a", "old")
        stage.worker.mistakes = {"b": "wrong"}
        stage.submit("b", "new")
        run, _ = stage.worker.train()
        stage.control.publish(run.id)
        assert stage.pointer() == (one, None)
        assert not [name for name, _ in stage.said() if name in {"version.canary", "version.withdrawn"}]
        assert stage.ended() == {}

    @pytest.mark.parametrize("max_attempts", [1, 3])
    def test_a_withdrawal_leaves_edits_as_any_rejection_does(
        self, stage: Stage, settings: Settings, max_attempts: int
    ) -> None:
        stage.stores = replace(
            stage.stores, edits=Stores.connect(settings.model_copy(update={"max_attempts": max_attempts})).edits
        )
        stage.worker.stores = stage.stores
        stage.restart()
        stage.served_since_long("a", "old")
        withdrawn, _, two = stage.candidate("b", "new")
        stage.stores.canaries.count(two, {"canary_errors": LASTS_REQUESTS})
        stage.control.tick()
        if max_attempts > 1:
            stage.stores.edits.retract(withdrawn.id)
        rejected = stage.submit("c", "new")
        stage.worker.mistakes = {"c": "wrong"}
        run, _ = stage.worker.train()
        stage.control.publish(run.id)
        left = [stage.stores.redis.hgetall(f"errata:edit:{edit.id}") for edit in (withdrawn, rejected)]
        if max_attempts == 1:
            assert [fields["status"] for fields in left] == ["failed", "failed"]
        for name in ("run", "version", "attempts"):
            assert left[0][name] == left[1][name], name

    def test_counts_that_come_after_a_canarys_end_are_nobodys(self, stage: Stage) -> None:
        stage.served_since_long("a", "old")
        _, _, two = stage.candidate("b", "new")
        stage.stores.canaries.count(two, {"canary_errors": LASTS_REQUESTS})
        stage.control.tick()
        stage.stores.canaries.count(two, {"canary_errors": 7})
        assert stage.stores.canaries.current() is None
        run, _ = stage.worker.train()
        stage.control.publish(run.id)
        stage.stores.canaries.count(two, {"canary_errors": 7})
        assert counts(stage) == (0, 0, 0, 0)


def failed(served: Gateway) -> httpx.Response:
    """The next answer of the canary."""
    while (response := served.ask()).status_code == 200:
        pass
    return response


class TestOperator:
    def test_an_operator_who_activates_the_canary_promotes_it(self, stage: Stage) -> None:
        stage.served_since_long("a", "old")
        edit, run, two = stage.candidate("b", "new")
        stage.control.activate(two)
        assert stage.pointer() == (two, None)
        assert stage.status(edit) == "live"
        stage.control.tick()
        assert stage.run(run) is RunStatus.SUCCEEDED
        assert stage.ended() == {"promoted": 1}

    def test_a_canary_that_is_withdrawn_while_it_is_activated_does_not_become_active(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the look at its state and the move of the pointer the nodes load it; by then it is rejected."""
        one = stage.served_since_long("a", "old")
        edit, run, two = stage.candidate("b", "new")
        load = stage.control.fleet.load_to_activate

        def slowly(record: VersionRecord) -> None:
            load(record)
            stage.stores.canaries.count(two, {"canary_errors": LASTS_REQUESTS})
            stage.control.tick()

        monkeypatch.setattr(stage.control.fleet, "load_to_activate", slowly)
        with pytest.raises(NotVerifiedError, match="rejected"):
            stage.control.activate(two)
        assert stage.pointer() == (one, None)
        assert (stage.run(run), stage.status(edit)) == (RunStatus.FAILED, "queued")

    @pytest.mark.parametrize("word", ["roll back", "roll back to 0", "activate the active one"])
    def test_an_operator_who_activates_another_version_ends_the_canary(self, stage: Stage, word: str) -> None:
        one = stage.served_since_long("a", "old")
        edit, run, two = stage.candidate("b", "new")
        before = stage.stores.registry.active()
        assert before is not None
        activations = stage.activations()
        match word:
            case "roll back":
                after = stage.control.roll_back(None)
            case "roll back to 0":
                after = stage.control.roll_back(0)
            case _:
                after = stage.control.activate(one, expected_active=one)
        stays = word == "activate the active one"
        assert (after.active, after.canary) == (one if stays else 0, None)
        assert after.epoch == before.epoch + 1
        assert stage.activations() == activations + (not stays), "no move if only the canary goes"
        assert after.previous == (before.previous if stays else one)
        asked = len(stage.node.asked)
        stage.control.tick()
        stage.control.tick()
        assert stage.pointer() == (after.active, None), "it does not come back"
        assert len(stage.node.asked) == asked, "nobody asks it any more"
        assert stage.run(run) is RunStatus.STALE
        assert stage.status(edit) == "held"
        assert stage.stores.registry.get(two).state is VersionState.VERIFIED
        withdrawn = [data for name, data in stage.said() if name == "version.withdrawn"]
        assert withdrawn == [{"version": two, "reason": f"version {after.active} was activated"}]
        assert stage.ended() == {"overtaken": 1}
        stage.control.activate(two)
        assert stage.status(edit) == "live", "it is kept and can be asked for"

    def test_an_activation_that_expected_another_version_ends_no_canary(self, stage: Stage) -> None:
        one = stage.served_since_long("a", "old")
        _, _, two = stage.candidate("b", "new")
        with pytest.raises(OvertakenError):
            stage.control.activate(0, expected_active=two)
        assert stage.pointer() == (one, two)

    def test_without_a_canary_the_active_version_named_again_changes_nothing(self, stage: Stage) -> None:
        one = stage.served_since_long("a", "old")
        before = stage.stores.registry.active()
        assert stage.control.activate(one) == before

    def test_a_rollback_while_the_canary_is_verified_at_its_end_stands(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The word stands although the promotion had passed every check before it."""
        stage.served_since_long("a", "old")
        edit, run, _ = stage.candidate("b", "new")
        stage.clock.now += LASTS_S
        activate = stage.stores.registry.activate

        def late(number: int, **expected: object) -> object:
            monkeypatch.undo()
            stage.control.roll_back(0)
            return activate(number, **expected)

        monkeypatch.setattr(stage.stores.registry, "activate", late)
        stage.control.tick()
        assert stage.pointer() == (0, None)
        assert (stage.run(run), stage.status(edit)) == (RunStatus.STALE, "held")


def died(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


class TestRestart:
    def test_a_restart_in_the_middle_of_a_canary_changes_nothing(self, stage: Stage, gateway: Gateways) -> None:
        one = stage.served_since_long("a", "old")
        edit, _, two = stage.candidate("b", "new")
        for number in (1, 2):
            with gateway(canary_share=1) as served:
                assert answer_of(served.ask())[0] == two
            assert counts(stage)[0] == number, "a service that stops tells what it knows"
            stage.restart()
            stage.control.tick()
            assert stage.pointer() == (one, two)
        asked = [version for version, prompt in stage.node.asked if prompt == "b"]
        assert asked.count(two) == 2, "it is verified at its beginning and not at each restart"
        stage.clock.now += LASTS_S
        stage.restart()
        stage.control.tick()
        assert stage.pointer() == (two, None)
        assert stage.status(edit) == "live"

    def test_a_restart_between_the_verification_and_the_canary_begins_it(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = stage.served_since_long("a", "old")
        stage.submit("b", "new")
        run, two = stage.worker.train()
        monkeypatch.setattr(stage.stores.canaries, "begin", died)
        with pytest.raises(KeyboardInterrupt):
            stage.control.publish(run.id)
        monkeypatch.undo()
        assert stage.pointer() == (one, None)
        stage.control.tick()
        assert stage.pointer() == (one, two)

    def test_a_restart_between_a_withdrawal_and_its_edits_gives_them_back(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = stage.served_since_long("a", "old")
        edit, run, two = stage.candidate("b", "new")
        stage.stores.canaries.count(two, {"canary_errors": LASTS_REQUESTS})
        monkeypatch.setattr(stage.stores.edits, "unclaim", died)
        with pytest.raises(KeyboardInterrupt):
            stage.control.tick()
        monkeypatch.undo()
        assert stage.pointer() == (one, None)
        for _ in range(2):
            stage.control.tick()
        assert stage.pointer() == (one, None), "it answers right and was withdrawn all the same"
        assert stage.stores.registry.get(two).state is VersionState.REJECTED
        assert (stage.run(run), stage.status(edit)) == (RunStatus.FAILED, "queued")
        assert stage.ended() == {"withdrawn": 1}
        assert stage.stores.measures.kept()[named(VERSIONS_JUDGED, "rejected")] == 1, "once, however often it is said"

    def test_a_restart_between_a_promotion_and_its_edits_makes_them_live(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage.served_since_long("a", "old")
        edit, run, two = stage.candidate("b", "new")
        stage.clock.now += LASTS_S
        with monkeypatch.context() as patched:
            patched.setattr(Publisher, "_complete", died)
            with pytest.raises(KeyboardInterrupt):
                stage.control.tick()
        stage.restart()
        stage.control.tick()
        assert stage.pointer() == (two, None)
        assert (stage.run(run), stage.status(edit)) == (RunStatus.SUCCEEDED, "live")

    def test_a_restart_between_a_promotion_and_the_withdrawal_of_its_edit_retracts_it(self, stage: Stage) -> None:
        """Its edit was superseded, and the one in its place withdrawn before it was learned: it stands again."""
        stage.served_since_long("a", "old")
        edit, _, two = stage.candidate("b", "one")
        stage.stores.edits.retract(stage.submit("b", "two").id)
        stage.clock.now += LASTS_S
        stage.control.tick()
        assert (stage.pointer(), stage.status(edit)) == ((two, None), "live")
        stage.restart(canary_share=0.0)
        stage.stores.edits.retract(edit.id)
        stage.control.tick()
        stage.worker.train()
        stage.control.tick()
        assert stage.status(edit) == "retracted"
        assert stage.stores.runs.idle(), "no run is asked for any more"

    def test_a_canary_whose_folder_is_gone_is_withdrawn(self, stage: Stage) -> None:
        one = stage.served_since_long("a", "old")
        edit, run, two = stage.candidate("b", "new")
        stage.stores.registry.mark(two, VersionState.MISSING, reason="its folder is away")
        stage.clock.now += LASTS_S
        stage.control.tick()
        assert stage.pointer() == (one, None)
        assert (stage.run(run), stage.status(edit)) == (RunStatus.FAILED, "queued")
        found = stage.stores.edits.get(edit.id).error
        assert found is not None
        assert found.message == "its folder is away"

    def test_a_canary_whose_folder_was_away_for_a_while_is_promoted(self, stage: Stage) -> None:
        """A repair found the folder away, and the next one found it again: nobody has verified it since."""
        stage.served_since_long("a", "old")
        edit, run, two = stage.candidate("b", "new")
        stage.stores.registry.mark(two, VersionState.COMMITTED, reason="it was found")
        stage.clock.now += LASTS_S
        stage.control.tick()
        assert stage.pointer() == (two, None)
        assert (stage.run(run), stage.status(edit)) == (RunStatus.SUCCEEDED, "live")

    def test_a_node_that_restarts_loads_the_canary_again(self, stage: Stage) -> None:
        one = stage.served_since_long("a", "old")
        _, _, two = stage.candidate("b", "new")
        stage.node.resident = set()
        stage.control.tick()
        assert stage.node.resident == {0, one, two}
        stage.node.resident = {one}
        stage.control.tick()
        assert stage.node.resident == {0, one, two}, "the node's own choice of what goes is made up for"

    def test_a_node_that_refuses_the_canary_once_it_has_restarted_serves_on(self, stage: Stage) -> None:
        """The canary is at fault: the node serves on, and the end of the canary's time brings it to light."""
        one = stage.served_since_long("a", "old")
        edit, _, two = stage.candidate("b", "new")
        stage.node.resident, stage.node.refuses = {one}, {two: (409, "damaged_version")}
        stage.control.tick()
        assert ejections(stage.stores.redis) == {}
        assert stage.pointer() == (one, two)
        stage.clock.now += LASTS_S
        stage.control.tick()
        assert stage.pointer() == (one, None)
        assert ejections(stage.stores.redis) == {}
        assert stage.stores.edits.get(edit.id).error is not None

    def test_a_canary_that_no_node_can_verify_at_its_end_is_withdrawn_in_time(self, stage: Stage) -> None:
        """Nobody can verify it: it is waited for from its end on, as long as for any version."""
        one = stage.served_since_long("a", "old")
        edit, run, two = stage.candidate("b", "new")
        stage.restart(verify_max_s=100)
        stage.node.ready = False
        stage.clock.now += LASTS_S + 98
        stage.control.tick()
        assert stage.pointer() == (one, two)
        stage.clock.now += 4
        stage.control.tick()
        assert stage.pointer() == (one, None)
        assert (stage.run(run), stage.status(edit)) == (RunStatus.FAILED, "queued")


class TestExactlyOne:
    def test_a_second_publisher_does_not_begin_the_canary_anew(self, stage: Stage) -> None:
        stage.served_since_long("a", "old")
        _, run, two = stage.candidate("b", "new")
        stage.stores.canaries.count(two, {"canary_ok": 3})
        stage.stores.canaries.begin(stage.stores.runs.get(run.id), two)
        assert counts(stage)[0] == 3
        assert [name for name, _ in stage.said()].count("version.canary") == 1

    def test_what_a_node_says_behind_the_promotion_does_not_count(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An operator activates the canary while its nodes are asked again, and one answers by a hair otherwise."""
        one = stage.served_since_long("a", "old")
        edit, _, two = stage.candidate("b", "new")
        stage.clock.now += LASTS_S
        ask = publication.verify

        def slow(*args: object, **how: object) -> Verdict:
            verdict = ask(*args, **how)
            stage.control.activate(two)
            wrong = FormatOutcome(matched=False, before="", after="?", finish_reason="stop")
            return replace(verdict, outcomes={edit.id: {Format.RAW: wrong}})

        with monkeypatch.context() as patched:
            patched.setattr(publication, "verify", slow)
            stage.control.tick()
        assert {outcome.matched for outcome in stage.stores.edits.get(edit.id).verified.values()} == {True}
        stage.control.roll_back(one)
        stage.control.activate(two)
        assert stage.status(edit) == "live"

    def test_a_run_that_has_ended_begins_no_canary(self, stage: Stage) -> None:
        one = stage.served_since_long("a", "old")
        _, run, two = stage.candidate("b", "new")
        known = stage.stores.runs.get(run.id)
        stage.stores.canaries.count(two, {"canary_errors": LASTS_REQUESTS})
        stage.control.tick()
        with pytest.raises(LeaseLostError):
            stage.stores.canaries.begin(known, two)
        assert stage.pointer() == (one, None)

    @pytest.mark.parametrize("before", ["mark_verified", "activate"])
    def test_what_is_no_canary_any_more_is_not_promoted(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch, before: str
    ) -> None:
        """A publisher whose verification outlived its lock, while another one withdrew the version."""
        one = stage.served_since_long("a", "old")
        edit, run, two = stage.candidate("b", "new")
        stage.clock.now += LASTS_S
        step = getattr(stage.stores.registry, before)

        def late(number: int, **expected: object) -> object:
            monkeypatch.undo()
            # It is killed before it gives the edits back.
            stage.stores.registry.reject(two, reason="it failed", run=run)
            return step(number, **expected)

        monkeypatch.setattr(stage.stores.registry, before, late)
        stage.control.tick()
        assert stage.pointer() == (one, None)
        assert stage.stores.registry.get(two).state is VersionState.REJECTED
        stage.control.tick()
        assert stage.run(run) is RunStatus.FAILED
        assert stage.status(edit) == "queued"

    def test_a_pointer_that_has_moved_begins_no_canary(self, stage: Stage) -> None:
        stage.served_since_long("a", "old")
        stage.submit("b", "new")
        run, _ = stage.worker.train()
        stage.control.roll_back(0)
        stage.control.publish(run.id)
        assert stage.pointer() == (0, None)
        assert stage.run(run) is RunStatus.STALE
