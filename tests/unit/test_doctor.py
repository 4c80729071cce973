"""Each check of the doctor: when all is well, and each way in which it is not."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from fake_service import RUN, VERSION

from service.doctor import Finding, Level, checks, examine
from service.doctor.checks import (
    NodeState,
    check_api,
    check_control_worker,
    check_disk,
    check_edits,
    check_ended_runs,
    check_model,
    check_node,
    check_redis,
    check_run,
    check_train_worker,
)
from service.doctor.examination import look_at_model, look_at_node, look_at_store, store_folder
from service.doctor.versions import StoreState, check_versions
from service.ejection import Ejection
from service.manifest import VersionInfo
from service.nodes import NodeClient
from service.schemas import EditStatus, Health, Run, VersionRecord
from service.settings import Settings
from worker.delta import DamagedDeltaError, VersionStore

SAFE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
GIB = 1024**3


def record(number: int, state: str = "verified") -> VersionRecord:
    fields = {name: value for name, value in VERSION.items() if name in VersionRecord.model_fields}
    return VersionRecord.model_validate({**fields, "version": number, "state": state})


def run(**changes: Any) -> Run:
    return Run.model_validate({**RUN, "finished_at": None, "started_at": 100, **changes})


def health(*, node: bool) -> Health:
    checks = {"node": {"ok": node, "detail": "no node is ready"}}
    return Health.model_validate({"ready": node, "active": 1, "checks": checks})


def test_a_redis_that_keeps_every_edit_is_ok() -> None:
    assert [finding.level for finding in check_redis(SAFE)] == [Level.OK]


@pytest.mark.parametrize(
    ("name", "value"), [("appendonly", "no"), ("appendfsync", "everysec"), ("maxmemory-policy", "allkeys-lru")]
)
def test_a_redis_that_can_lose_an_edit_is_a_failure(name: str, value: str) -> None:
    [finding] = check_redis({**SAFE, name: value})

    assert finding.level is Level.FAIL
    assert f"{name} is {value}" in finding.found
    assert finding.advice.startswith(f"redis-cli config set {name} {SAFE[name]}")


def test_a_redis_that_does_not_tell_is_a_warning() -> None:
    assert [finding.level for finding in check_redis({})] == [Level.WARN]


def test_an_api_that_does_not_answer_or_is_not_ready_is_found() -> None:
    assert check_api(None, "").level is Level.FAIL
    assert check_api("http://x", "nothing answers").found == "nothing answers"
    assert check_api("http://x", health(node=True)).level is Level.OK
    assert check_api("http://x", health(node=False)).found == "not ready: node: no node is ready"


def test_a_train_worker_that_is_not_heard_of_is_a_failure() -> None:
    assert check_train_worker(["train@host"]).level is Level.OK
    assert check_train_worker([]).level is Level.FAIL


@pytest.mark.parametrize(
    ("silent_s", "status", "level"),
    [
        (-0.5, None, Level.OK),
        (2.0, None, Level.OK),
        (40.0, None, Level.FAIL),
        (40.0, "training", Level.FAIL),
        (40.0, "verifying", Level.WARN),
        (1000.0, "verifying", Level.FAIL),
        (None, None, Level.FAIL),
        (None, "verifying", Level.FAIL),
    ],
)
def test_a_control_worker_that_is_silent_for_too_long_is_found(
    silent_s: float | None, status: str | None, level: Level
) -> None:
    assert check_control_worker(silent_s, run(status=status) if status else None).level is level


def test_the_doctor_has_the_alerts_bounds() -> None:
    groups = yaml.safe_load((Path(__file__).parents[2] / "docker/prometheus/rules.yml").read_text())["groups"]
    rules = {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}
    assert rules["ErrataControlWorkerSilent"].endswith(f" > {checks._VERIFYING_SILENCE_S:.0f}")
    assert rules["ErrataRunsFail"].endswith(f" >= {checks._MOST_FAILURES}")


@pytest.mark.parametrize(
    ("found", "leased", "now", "level"),
    [
        (None, False, 0, Level.OK),
        (run(status="training"), True, 200, Level.OK),
        (run(status="training"), False, 200, Level.WARN),
        (run(status="verifying"), False, 200, Level.OK),
        (run(status="verifying"), False, 2000, Level.FAIL),
    ],
)
def test_a_run_without_a_lease_or_for_too_long_is_found(
    found: Run | None, leased: bool, now: float, level: Level
) -> None:
    assert check_run(found, leased=leased, now=now, longest_s=1000).level is level


def ended(*statuses: str) -> list[Run]:
    """Runs, newest first; each tells which one it is."""
    errors = [{"code": "gate", "message": f"reason {number}"} for number, _ in enumerate(statuses)]
    return [
        run(id=f"run_{number}", status=status, error=errors[number] if status == "failed" else None)
        for number, status in enumerate(statuses)
    ]


@pytest.mark.parametrize(
    ("statuses", "level"),
    [
        ((), Level.OK),
        (("succeeded", "failed", "failed", "failed"), Level.OK),
        (("queued", "training", "cancelled", "stale"), Level.OK),
        (("failed", "failed", "succeeded", "failed"), Level.WARN),
        (("training", "failed", "cancelled", "failed", "failed", "succeeded"), Level.FAIL),
    ],
)
def test_runs_that_fail_in_a_row_are_found(statuses: Sequence[str], level: Level) -> None:
    assert check_ended_runs(ended(*statuses)).level is level


def test_the_newest_failure_is_named_with_its_reason() -> None:
    found = check_ended_runs(ended("training", "failed", "failed")).found
    assert found == "2 failed since the last that succeeded, lastly run_1: reason 1 (gate)"
    assert check_ended_runs([run(status="failed")]).found.endswith("no reason is kept")


def test_a_node_that_is_left_out_is_not_well_whatever_it_holds() -> None:
    node = NodeState("http://n", ready=True, resident=[0, 1], tensors=dict(record(1).tensors))
    left = Ejection(reason="its disk is full", attempts=7, again_at=0.0)

    for active in (record(1), None):
        finding = check_node(node, active, left)
        assert finding.level is Level.FAIL
        assert "after 7 attempts: its disk is full" in finding.found


def test_a_node_with_the_right_weights_is_ok() -> None:
    node = NodeState("http://n", ready=True, resident=[0, 1], tensors=dict(record(1).tensors))

    assert check_node(node, record(1)).level is Level.OK
    assert check_node(NodeState("http://n", ready=True), None).level is Level.OK


@pytest.mark.parametrize(
    ("node", "level", "found"),
    [
        (NodeState("http://n", ready=False), Level.FAIL, "is not ready"),
        (NodeState("http://n", ready=True, trouble="401"), Level.FAIL, "401"),
        (NodeState("http://n", ready=True, resident=[0]), Level.WARN, "does not hold version 1"),
        (NodeState("http://n", ready=True, resident=[1], tensors={"w": "b"}), Level.FAIL, "checksums differ"),
        (NodeState("http://n", ready=True, resident=[1], tensors={}), Level.FAIL, "checksums differ"),
    ],
)
def test_a_node_that_is_not_well_is_found(node: NodeState, level: Level, found: str) -> None:
    finding = check_node(node, record(1))

    assert finding.level is level
    assert found in finding.found
    assert finding.advice


def test_a_model_folder_that_lacks_files_is_found(tmp_path: Path) -> None:
    def checked(model: str) -> Finding:
        return check_model(look_at_model(model))

    (tmp_path / "config.json").touch()
    assert checked(str(tmp_path)).level is Level.FAIL
    assert checked(str(tmp_path)).found == f"{tmp_path} lacks tokenizer.json, *.safetensors"

    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert checked(str(tmp_path)).level is Level.OK
    assert checked("org/name").level is Level.WARN
    assert checked("").level is Level.OK


@pytest.mark.parametrize(("free", "level"), [(100, Level.OK), (3, Level.WARN), (0, Level.FAIL)])
def test_a_disk_with_little_room_is_found(free: int, level: Level) -> None:
    [finding] = check_disk({"home": Path("/x"), "version store": None}, lambda _: free * GIB)

    assert finding.level is level


def test_versions_that_are_all_there_are_ok() -> None:
    [finding] = check_versions([record(1), record(0)], 1, StoreState([0, 1]))

    assert finding.level is Level.OK


def test_versions_that_are_missing_are_failures() -> None:
    records = [record(4), record(3, "rejected"), record(2, "missing"), record(1), record(0)]

    active, others = check_versions(records, 4, StoreState([0]))

    assert "version 4, the active one, is not in the store" in active.found
    assert others.found == "registered and not in the store: 2, 1"
    assert {active.level, others.level} == {Level.FAIL}


def test_a_store_with_more_than_is_registered_is_a_warning() -> None:
    unknown, leftover = check_versions([record(0)], 0, StoreState([0, 2, 1], [".000003.ab", "000004"]))

    assert unknown.found == "in the store and not registered: 1, 2"
    assert leftover.found == "2 folders in the store are no whole versions: .000003.ab, 000004"
    assert {unknown.level, leftover.level} == {Level.WARN}


def test_versions_that_are_damaged_are_failures() -> None:
    damaged = {0: "edits.jsonl is missing", 1: "delta.safetensors is missing", 5: "manifest.json cannot be read"}

    findings = check_versions([record(1, "rejected"), record(0)], 0, StoreState([], damaged=damaged))

    assert [finding.found for finding in findings] == [
        "version 0 is damaged in the store: edits.jsonl is missing",
        "version 5 is damaged in the store: manifest.json cannot be read",
    ]
    assert {finding.level for finding in findings} == {Level.FAIL}


def test_a_store_is_looked_at(tmp_path: Path) -> None:
    assert look_at_store(str(tmp_path)) == StoreState([], [])
    store = VersionStore(str(tmp_path))
    for number in (0, 3, 1_000_000):
        write_version(store, number)
    (tmp_path / "000003").rename(tmp_path / ".000008.ab")
    for name in ("000007", "lost+found"):
        (tmp_path / name).mkdir()
    assert look_at_store(str(tmp_path)) == StoreState([0, 1_000_000], [".000008.ab", "000007"])
    assert look_at_store("s3://bucket/versions") is None


def write_version(store: VersionStore, number: int = 1) -> None:
    info = {"version": number, "parent": 0, "base": {"name": "b", "fingerprint": "f" * 64}, "location": "l"}
    info |= {"run": {}, "metrics": {}, "created_at": 0}
    store.write(VersionInfo.model_validate(info), {"w": torch.zeros(2)}, [{"id": "edit_1"}])


@pytest.mark.parametrize(
    ("file", "content", "damage"),
    [
        ("delta.safetensors", None, "delta.safetensors is missing"),
        ("edits.jsonl", b"", "edits.jsonl has 0 bytes, expected 17"),
        ("manifest.json", b"{", "manifest.json cannot be read: Invalid JSON"),
        ("manifest.json", b"[]", "manifest.json cannot be read: Input should be an object"),
        ("manifest.json", b"{}", "manifest.json cannot be read: version: Field required"),
    ],
)
def test_a_version_whose_files_are_not_what_was_written_is_damaged(
    tmp_path: Path, file: str, content: bytes | None, damage: str
) -> None:
    store = VersionStore(str(tmp_path))
    write_version(store)
    assert look_at_store(str(tmp_path)) == StoreState([1], [])
    path = tmp_path / "000001" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)

    found = look_at_store(str(tmp_path))
    assert found is not None
    assert (found.whole, found.leftovers, found.damaged.keys()) == ([], [], {1})
    assert found.damaged[1].startswith(damage)
    with pytest.raises(DamagedDeltaError, match=f"^version 1: {re.escape(found.damaged[1])}$"):
        store.whole(1)


def test_a_folder_with_another_versions_manifest_is_damaged(tmp_path: Path) -> None:
    store = VersionStore(str(tmp_path))
    write_version(store)
    Path(store.folder(1)).rename(store.folder(2))
    assert look_at_store(str(tmp_path)) == StoreState([], [], {2: "manifest.json is of version 1"})


def test_without_a_version_it_is_a_failure_and_a_remote_store_is_not_looked_at() -> None:
    assert check_versions([], None, None)[0].level is Level.FAIL
    assert check_versions([record(0)], 0, None)[0].level is Level.OK


def test_edits_in_training_without_a_run_are_a_warning() -> None:
    counts = dict.fromkeys(EditStatus, 0)
    assert check_edits(counts, None).level is Level.OK
    assert check_edits({**counts, EditStatus.TRAINING: 1}, run(status="training")).level is Level.OK
    stuck = check_edits({**counts, EditStatus.TRAINING: 1, EditStatus.TRAINED: 2}, None)
    assert (stuck.level, stuck.found) == (Level.WARN, "3 are in training or trained, and no run is under way")


def test_only_a_local_store_has_a_folder() -> None:
    assert store_folder("/a/b") == store_folder("file:///a/b") == Path("/a/b")
    assert store_folder("s3://bucket/versions") is None


@pytest.mark.parametrize(
    ("read_back", "level"),
    [
        (httpx.Response(200, json={"version": 1, "tensors": VERSION["tensors"]}), Level.OK),
        (httpx.Response(200, json={"version": 1, "tensors": {}}), Level.FAIL),
        (httpx.Response(200, json=[]), Level.FAIL),
        (httpx.Response(401, text="no"), Level.FAIL),
    ],
)
def test_a_node_is_read_back(read_back: httpx.Response, level: Level) -> None:
    def node(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/checksum"):
            return read_back
        where = {"slot": 0, "pinned": True, "device_bytes": 1, "host_bytes": 1}
        return httpx.Response(200, json={"resident": [{"version": 0, **where}, {"version": 1, **where}]})

    client = NodeClient("http://n", token="t", timeout_s=5, transport=httpx.MockTransport(node))
    found = look_at_node(client, record(1))

    assert check_node(found, record(1)).level is level


def test_a_node_that_is_gone_is_not_ready() -> None:
    found = look_at_node(NodeClient("http://127.0.0.1:1", token="", timeout_s=1), record(1))

    assert not found.ready


def test_a_redis_that_is_not_there_is_a_finding(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, redis_url="redis://127.0.0.1:1/0", model=str(tmp_path))

    findings = examine(settings, url="http://127.0.0.1:1")

    by_part = {finding.part: finding for finding in findings}
    assert by_part["redis"].level is by_part["service"].level is by_part["model"].level is Level.FAIL
    assert "does not answer" in by_part["redis"].found
    assert "nothing answers" in by_part["service"].found
