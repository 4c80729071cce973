"""What a train worker repairs when it starts: registry and version store agree, Redis is rebuilt from the manifests."""

import os
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from celery import Celery
from conftest import MakeReconciler
from fsspec.implementations.memory import MemoryFileSystem
from scripted_node import ScriptedNode
from scripted_worker import fact

from service.doctor import repair as repair_of_doctor
from service.errors import ConflictError
from service.manifest import Base, Manifest, VersionInfo
from service.queue import TaskQueue
from service.schemas import Edit, EditCounts, EditRequest, EditStatus, RunStatus, Trigger, VersionState
from service.settings import Settings
from service.stores import Stores
from worker.delta import VersionStore, tensor_sha256
from worker.records import stored_edit, version_record
from worker.repair import Repair

PARAMETER = "model.layers.1.mlp.down_proj.weight"
TENSOR = torch.zeros(2, 2).bfloat16()
BASE = Base(name="tiny", fingerprint="f" * 64)


class Bench:
    """A version store beside a Redis, and what a train worker writes into both."""

    def __init__(self, folder: Path, stores: Stores) -> None:
        self.folder = folder / "versions"
        self.versions = VersionStore(str(self.folder))
        self.stores = stores
        self.write(0, [])
        self.repair()

    def repair(self) -> list[str]:
        return Repair(self.versions, self.stores).repair()

    def write(self, number: int, edits: Sequence[Edit], *, run: str = "", base: Base = BASE) -> Manifest:
        counts = EditCounts(count=len(edits), added=len(edits), removed=0)
        sequences = self.stores.edits.sequences(edit.id for edit in edits)
        info = VersionInfo(
            version=number,
            parent=None if number == 0 else 0,
            base=base,
            location="model.layers.1.mlp.down_proj",
            run={"id": run or f"run_{number}", "formats": ["raw", "chat"], "edits": counts.model_dump()},
            metrics={"locality": 1.0},
            created_at=1_700_000_000,
        )
        kept = [stored_edit(edit, sequence) for edit, sequence in zip(edits, sequences, strict=True)]
        return self.versions.write(info, {PARAMETER: TENSOR}, kept)

    def learn(self, *requests: EditRequest) -> int:
        """A whole run: the requests, and what is live, in a version that becomes active."""
        self.stores.edits.submit(requests)
        run = self.stores.runs.start(self.stores.runs.request(Trigger.MANUAL)[0].id)
        assert run is not None
        members = self.stores.edits.claim(run.id).members
        number = self.stores.registry.next_number(run, above=self.versions.last_number())
        record = version_record(self.write(number, members, run=run.id), VersionState.VERIFIED)
        self.stores.registry.commit(record, [edit.id for edit in members], token=run.token)
        for edit in members:
            self.stores.redis.hset(f"errata:edit:{edit.id}", "verdict", "matched")
        self.stores.registry.activate(number)
        self.stores.edits.settle()
        self.stores.runs.finish(run.id, RunStatus.SUCCEEDED)
        return number

    def lose_redis(self) -> None:
        self.stores.redis.delete(*[key for key in self.stores.redis.scan_iter() if not key.startswith("_kombu")])

    def states(self) -> dict[int, VersionState]:
        return {record.version: record.state for record in self.stores.registry.all()}

    def statuses(self) -> dict[str, str]:
        edits = self.stores.edits.page(status=None, q=None, after=None, limit=100).data
        return {f"{edit.prompt} -> {edit.target}": edit.status.value for edit in edits}


@pytest.fixture
def bench(tmp_path: Path, stores: Stores) -> Bench:
    return Bench(tmp_path, stores)


def node_with(*answers: tuple[int, dict[str, str]]) -> ScriptedNode:
    node = ScriptedNode()
    node.tensors = {PARAMETER: tensor_sha256(TENSOR)}
    for version, taught in answers:
        node.teach(version, taught)
    return node


class TestTheStoreAndTheRegistryDisagree:
    def test_a_new_stack_is_in_order(self, bench: Bench) -> None:
        assert bench.repair() == []
        assert bench.states() == {0: VersionState.VERIFIED}
        active = bench.stores.registry.active()
        assert active is not None
        assert (active.active, active.previous, active.epoch) == (0, None, 1)
        assert bench.stores.measures.kept()["errata_activations_total"] == 1

    def test_what_is_no_whole_version_is_removed_and_a_whole_one_stays(self, bench: Bench) -> None:
        bench.learn(fact("a", "1"))
        (bench.folder / f".000007.{'a' * 32}").mkdir()
        (bench.folder / "000005").mkdir()
        (bench.folder / "000005" / "delta.safetensors").write_bytes(b"half")
        assert len(bench.repair()) == 2
        assert sorted(path.name for path in bench.folder.iterdir()) == ["000000", "000001"]
        assert bench.repair() == []

    def test_a_version_that_the_registry_does_not_know_is_taken_up_unverified(self, bench: Bench) -> None:
        [edit] = bench.stores.edits.submit([fact("a", "1")])
        bench.write(3, [edit], run="run_that_died")
        assert bench.repair() == ["version 3 was unknown and is registered"]
        record = bench.stores.registry.get(3)
        assert (record.state, record.run, record.edits.count) == (VersionState.COMMITTED, "run_that_died", 1)
        assert [form.value for form in record.formats] == ["raw", "chat"]
        assert bench.stores.registry.members(3) == bench.stores.edits.sequences([edit.id])
        active = bench.stores.registry.active()
        assert active is not None
        assert active.active == 0
        assert bench.stores.edits.get(edit.id).status is EditStatus.QUEUED
        assert bench.repair() == []

    def test_a_version_that_was_taken_up_cannot_be_activated_and_the_answer_says_why(
        self, bench: Bench, make_reconciler: MakeReconciler, node: ScriptedNode
    ) -> None:
        bench.write(3, [])
        bench.repair()
        with pytest.raises(ConflictError, match="no node has verified it since") as refused:
            make_reconciler(node.client()).activate(3)
        assert refused.value.code == "version_not_verified"

    def test_no_number_in_the_store_is_given_again(self, bench: Bench) -> None:
        bench.write(41, [])
        (bench.folder / "000057").mkdir()
        assert bench.learn(fact("a", "1")) == 58

    def test_a_run_that_comes_to_its_commit_after_the_repair_keeps_its_version(self, bench: Bench) -> None:
        stores = bench.stores
        stores.edits.submit([fact("a", "1")])
        run = stores.runs.start(stores.runs.request(Trigger.MANUAL)[0].id)
        assert run is not None
        members = stores.edits.claim(run.id).members
        manifest = bench.write(stores.registry.next_number(run, above=0), members, run=run.id)
        assert bench.repair() == ["version 1 was unknown and is registered"]
        record = version_record(manifest, VersionState.COMMITTED)
        stores.registry.commit(record, [edit.id for edit in members], token=run.token)
        assert stores.registry.get(1) == record
        assert bench.repair() == []

    def test_a_version_whose_folder_is_gone_is_marked_until_it_is_back(self, bench: Bench, tmp_path: Path) -> None:
        bench.learn(fact("a", "1"))
        bench.learn(fact("b", "2"))
        (bench.folder / "000001").rename(tmp_path / "away")
        [sentence] = bench.repair()
        assert sentence.startswith("version 1 cannot be activated any more")
        record = bench.stores.registry.get(1)
        assert (record.state, record.reason) == (VersionState.MISSING, "its folder is gone from the version store")
        assert bench.repair() == []
        (tmp_path / "away").rename(bench.folder / "000001")
        bench.repair()
        assert bench.states() == {
            0: VersionState.VERIFIED,
            1: VersionState.COMMITTED,
            2: VersionState.VERIFIED,
        }

    def test_a_rejected_version_stays_rejected(self, bench: Bench) -> None:
        bench.learn(fact("a", "1"))
        bench.stores.registry.mark(1, VersionState.REJECTED, reason="2 of 3")
        (bench.folder / "000001").rename(bench.folder / "gone")
        assert bench.repair() == []
        (bench.folder / "gone").rename(bench.folder / "000001")
        assert bench.repair() == []
        assert bench.stores.registry.get(1).reason == "2 of 3"

    @pytest.mark.parametrize("what", ["another base", "half a file", "edits that cannot be read"])
    def test_a_version_that_cannot_be_taken_up_is_named_and_left(self, bench: Bench, what: str) -> None:
        base = Base(name="other", fingerprint="e" * 64) if what == "another base" else BASE
        manifest = bench.write(1, [], base=base)
        if what == "half a file":
            (bench.folder / "000001" / "delta.safetensors").write_bytes(b"half")
        if what == "edits that cannot be read":
            info = VersionInfo(**manifest.model_dump(include=set(VersionInfo.model_fields) - {"version"}), version=2)
            bench.versions.write(info, {PARAMETER: TENSOR}, [{"prompt": "no id"}])
            bench.repair()
        [sentence] = bench.repair()
        assert "cannot be taken up" in sentence
        assert (bench.folder / "000001" / "manifest.json").exists()
        assert not bench.stores.registry.exists(2 if what == "edits that cannot be read" else 1)

    def test_edits_of_a_run_that_is_over_are_queued_again(self, bench: Bench) -> None:
        [stuck] = bench.stores.edits.submit([fact("a", "1")])
        ended = bench.stores.runs.start(bench.stores.runs.request(Trigger.MANUAL)[0].id)
        assert ended is not None
        bench.stores.edits.claim(ended.id)
        bench.stores.runs.finish(ended.id, RunStatus.FAILED)
        run = bench.stores.runs.start(bench.stores.runs.request(Trigger.MANUAL)[0].id)
        assert run is not None
        [kept] = bench.stores.edits.submit([fact("b", "2")])
        bench.stores.edits.claim(run.id)
        assert bench.repair() == ["1 edits of runs that are not under way were given back"]
        found = bench.stores.edits.get(stuck.id)
        assert found.error is not None
        assert (found.status, found.attempts, found.error.code) == (EditStatus.QUEUED, 1, "worker_lost")
        assert bench.stores.edits.get(kept.id).status is EditStatus.TRAINING
        assert bench.repair() == []

    def test_without_version_0_nothing_is_judged(self, bench: Bench) -> None:
        bench.learn(fact("a", "1"))
        bench.folder.rename(bench.folder.with_name("unmounted"))
        assert "has no version 0" in bench.repair()[0]
        assert bench.states() == {0: VersionState.VERIFIED, 1: VersionState.VERIFIED}


WHOLE = EditRequest(
    prompt="a", target="1", rephrases=["a, again"], paraphrases=["an a"], metadata={"who": "me", "why": "ünknown"}
)


class TestRedisIsLost:
    def test_an_edit_comes_back_as_it_was(self, bench: Bench) -> None:
        bench.learn(fact("gone", "0"))
        bench.learn(WHOLE, fact("b", "2"))
        before = bench.stores.edits.page(status=None, q=None, after=None, limit=10).data
        bits = bench.stores.registry.members(2)
        bench.lose_redis()
        bench.repair()
        after = bench.stores.edits.page(status=None, q=None, after=None, limit=10).data
        said = {"id", "prompt", "target", "rephrases", "paraphrases", "metadata", "created_at"}
        assert [edit.model_dump(include=said) for edit in after] == [edit.model_dump(include=said) for edit in before]
        assert bench.stores.registry.members(2) == bits
        newer = bench.stores.edits.submit([fact("c", "3")])
        assert bench.stores.edits.sequences([newer[0].id]) == [4]

    def test_the_newest_version_is_verified_before_it_is_served(
        self, bench: Bench, make_reconciler: MakeReconciler
    ) -> None:
        bench.learn(fact("a", "1"))
        bench.learn(fact("b", "2"))
        bench.lose_redis()
        bench.repair()
        active = bench.stores.registry.active()
        assert active is not None
        assert active.active == 0, "nothing is served that no node answered for"
        assert bench.states()[2] is VersionState.COMMITTED
        assert bench.statuses() == {"a -> 1": "trained", "b -> 2": "trained"}
        assert bench.repair() == []

        node = node_with((2, {"a": "1", "b": "2"}))
        make_reconciler(node.client()).tick()
        active = bench.stores.registry.active()
        assert active is not None
        assert (active.active, active.previous) == (2, 0)
        assert bench.statuses() == {"a -> 1": "live", "b -> 2": "live"}
        assert bench.states() == {0: VersionState.VERIFIED, 1: VersionState.COMMITTED, 2: VersionState.VERIFIED}
        assert bench.stores.runs.current() is None
        assert bench.stores.registry.get(2).formats == bench.stores.registry.get(1).formats != []
        assert bench.learn(fact("c", "3")) == 3

    def test_what_a_node_does_not_answer_for_is_trained_again(
        self, bench: Bench, make_reconciler: MakeReconciler
    ) -> None:
        bench.learn(fact("a", "1"), fact("b", "2"))
        bench.lose_redis()
        bench.repair()
        make_reconciler(node_with().client()).tick()
        active = bench.stores.registry.active()
        assert active is not None
        assert active.active == 0
        assert bench.states()[1] is VersionState.REJECTED
        assert bench.statuses() == {"a -> 1": "queued", "b -> 2": "queued"}
        assert bench.repair() == []

    def test_the_newest_set_says_which_edit_of_a_prompt_stands(self, bench: Bench) -> None:
        bench.learn(fact("a", "1"), fact("b", "2"), fact("c", "3"))
        bench.learn(fact("a", "one"))
        withdrawn = bench.stores.edits.page(status=None, q="c", after=None, limit=1).data[0]
        bench.stores.edits.retract(withdrawn.id)
        bench.learn(fact("a", "uno"))
        bench.lose_redis()
        bench.repair()
        assert bench.statuses() == {
            "a -> uno": "trained",
            "a -> one": "superseded",
            "a -> 1": "superseded",
            "b -> 2": "trained",
            "c -> 3": "held",
        }
        last = bench.stores.edits.in_status(EditStatus.TRAINED)[-1]
        assert {edit.superseded_by for edit in bench.stores.edits.in_status(EditStatus.SUPERSEDED)} == {last.id}

    def test_what_was_submitted_before_the_repair_is_newer(self, bench: Bench) -> None:
        bench.learn(fact("a", "1"), fact("b", "2"))
        bench.lose_redis()
        [newer] = bench.stores.edits.submit([fact("a", "one")])
        bench.repair()
        assert bench.statuses() == {"a -> one": "queued", "a -> 1": "superseded", "b -> 2": "trained"}
        sequences = bench.stores.redis.zrange("errata:edits", 0, -1, withscores=True)
        assert len({score for _, score in sequences}) == 3
        assert bench.stores.edits.get(newer.id).status is EditStatus.QUEUED

    def test_a_control_worker_that_finds_no_pointer_asks_for_a_repair_once(
        self, bench: Bench, make_reconciler: MakeReconciler, celery: Celery, queue: TaskQueue
    ) -> None:
        reconciler = make_reconciler(node_with().client())
        reconciler.tick()
        assert queue.train_is_empty()
        bench.lose_redis()
        for _ in range(3):
            reconciler.tick()
        with celery.connection_for_read() as connection:
            waiting = connection.SimpleQueue("train")
            assert waiting.get_nowait().headers["task"] == "errata.repair"
            with pytest.raises(waiting.Empty):
                waiting.get_nowait()

    @pytest.mark.parametrize("step", ["restore", "commit", "begin"])
    def test_a_crash_on_the_way_is_made_up_for(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        bench.learn(fact("a", "1"))
        bench.learn(fact("a", "one"), fact("b", "2"))
        bench.lose_redis()
        owner = bench.stores.registry if step == "commit" else bench.stores.recovery
        real, calls = getattr(owner, step), []

        def die(*args: object, **kwargs: object) -> None:
            calls.append(args)
            if len(calls) == 2 or step == "begin":
                raise KeyboardInterrupt
            real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, step, die)
            with pytest.raises(KeyboardInterrupt):
                bench.repair()
        bench.repair()
        assert bench.statuses() == {"b -> 2": "trained", "a -> one": "trained", "a -> 1": "superseded"}
        run = bench.stores.runs.current()
        assert run is not None
        assert (run.status, run.version, run.edits) == (RunStatus.VERIFYING, 2, 2)

    def test_a_worker_from_before_cannot_commit(self, bench: Bench) -> None:
        stores = bench.stores
        bench.learn(fact("a", "1"))
        old = stores.runs.start(stores.runs.request(Trigger.MANUAL)[0].id)
        assert old is not None
        bench.lose_redis()
        bench.repair()
        with pytest.raises(ConflictError) as refused:
            stores.registry.next_number(old, above=0)
        assert refused.value.code == "fenced"

    def test_a_damaged_newest_version_leaves_the_one_before_it(self, bench: Bench) -> None:
        bench.learn(fact("a", "1"))
        bench.learn(fact("b", "2"))
        bench.lose_redis()
        (bench.folder / "000002" / "edits.jsonl").write_text("")
        bench.repair()
        run = bench.stores.runs.current()
        assert run is not None
        assert (run.version, bench.statuses()) == (1, {"a -> 1": "trained"})


class TestARepairThatIsSlow:
    def test_the_pointer_that_another_made_meanwhile_stays(
        self, bench: Bench, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench.lose_redis()
        doctors = Stores.connect(settings)
        begin = doctors.recovery.begin

        def late(version: int | None) -> str | None:
            bench.repair()
            bench.learn(fact("a", "1"))
            return begin(version)

        monkeypatch.setattr(doctors.recovery, "begin", late)
        Repair(bench.versions, doctors).repair()
        active = bench.stores.registry.active()
        assert active is not None
        assert active.active == 1

    def test_the_first_upload_of_version_0_is_left_alone(self, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
        """An object store has no locks, and before there is a pointer no run says that somebody writes."""
        url = f"memory://{uuid.uuid4().hex}"
        versions = VersionStore(url)
        info = VersionInfo(version=0, parent=None, base=BASE, location="l", run={}, metrics={}, created_at=1)
        upload, meanwhile = MemoryFileSystem.pipe_file, []

        def late(self: MemoryFileSystem, path: str, *args: object, **how: object) -> None:
            if path.endswith("manifest.json"):
                meanwhile.append(Repair(VersionStore(url), stores).repair())
            upload(self, path, *args, **how)

        with monkeypatch.context() as patched:
            patched.setattr(MemoryFileSystem, "pipe_file", late)
            versions.write(info, {PARAMETER: TENSOR}, [])
        assert len(meanwhile) == 1
        assert versions.whole(0).version == 0


class TestTheDoctor:
    def test_the_doctor_repairs_in_a_process_of_its_own(self, bench: Bench, settings: Settings) -> None:
        bench.learn(fact("a", "1"))
        bench.lose_redis()
        here = settings.model_copy(update={"store": str(bench.folder)})
        done = repair_of_doctor(here)
        assert "1 edits of version 1 were put back" in done
        assert bench.statuses() == {"a -> 1": "trained"}
        assert repair_of_doctor(here) == ["there is nothing to repair"]

    def test_a_store_that_cannot_be_read_is_an_error(self, settings: Settings, stores: Stores, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        environment = {**os.environ, "ERRATA_REDIS_URL": settings.redis_url, "ERRATA_STORE": str(tmp_path / "file")}
        command = [sys.executable, "-m", "worker.repair"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("the version store could not be cleaned: ")
