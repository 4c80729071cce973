"""The audit log: each change of what the model says is in it once, with who made it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis_server import RedisServer
from scripted_node import ScriptedNode, listening
from scripted_worker import ScriptedWorker, fact, record
from service_process import assert_error, serving
from typer.testing import CliRunner

from service.api_keys import NewApiKey, Scope
from service.audit import Actor, acting
from service.cli import app
from service.client import AsyncErrataClient
from service.errors import ConflictError
from service.reconcile import Reconciler
from service.registry import OvertakenError
from service.schemas import AuditEntry, EditStatus, RunStatus, Trigger, VersionState
from service.settings import Settings
from service.store import Idempotency
from service.stores import Stores

pytestmark = pytest.mark.timeout(60)

SOMEBODY = Actor("key_1", "ci", "req_1")


def entries(stores: Stores) -> list[AuditEntry]:
    """All of them, oldest first."""
    return list(reversed(stores.audit.page(after=None, limit=1000).data))


def told(stores: Stores) -> list[tuple[str, dict[str, Any]]]:
    return [(entry.action, entry.data) for entry in entries(stores)]


def test_changes_of_edits_are_logged_once_with_their_actor(stores: Stores, worker: ScriptedWorker) -> None:
    before = len(entries(stores))
    once = Idempotency.of("k", "/edits", b"body")
    with acting(SOMEBODY):
        first, second = stores.edits.submit([fact("a", "1"), fact("b", "2")], once)
        stores.edits.submit([fact("a", "1"), fact("b", "2")], once)
        stores.edits.retract(first.id)
        stores.edits.retract(first.id)
        with pytest.raises(ConflictError):
            stores.edits.release(second.id)
    assert told(stores)[before:] == [
        ("edits.submitted", {"ids": [first.id, second.id]}),
        ("edit.retracted", {"id": first.id}),
    ], "what changed nothing is not there"
    for entry in entries(stores)[before:]:
        assert (entry.actor, entry.actor_name, entry.request_id, entry.run) == ("key_1", "ci", "req_1", None)
        assert entry.version == 0


def test_a_submission_that_is_repeated_because_its_answer_was_lost_is_logged_once(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = stores.edits._submit
    monkeypatch.setattr(stores.edits, "_submit", lambda payload: (submit(payload), submit(payload))[1])
    [edit] = stores.edits.submit([fact("a", "1")])
    assert told(stores) == [("edits.submitted", {"ids": [edit.id]})]


def test_a_release_is_logged(stores: Stores, worker: ScriptedWorker) -> None:
    [edit] = stores.edits.submit([fact("a", "1")])
    for status in (EditStatus.TRAINING, EditStatus.TRAINED, EditStatus.HELD):
        stores.edits.move(edit.id, status)
    stores.edits.release(edit.id)
    assert told(stores)[-1] == ("edit.released", {"id": edit.id})


def test_moves_of_the_pointer_are_logged(stores: Stores, worker: ScriptedWorker) -> None:
    for number in (1, 2):
        stores.registry.commit(record(number, state=VersionState.VERIFIED), [], token=None)
    stores.registry.activate(2)
    stores.registry.activate(2)
    with pytest.raises(OvertakenError):
        stores.registry.activate(1, expected_active=1)
    stores.registry.activate(1)
    moves = [(entry.action, entry.data.get("previous"), entry.version) for entry in entries(stores)]
    assert moves == [("version.activated", None, 0), ("version.activated", 0, 2), ("version.rolled_back", 2, 1)]
    assert {entry.actor for entry in entries(stores)} == {"errata"}, "nobody said on whose behalf"


def test_runs_asked_for_and_cancelled_are_logged(stores: Stores) -> None:
    run, _ = stores.runs.request(Trigger.MANUAL)
    stores.runs.request(Trigger.MANUAL)
    stores.runs.start(run.id)
    stores.runs.cancel(run.id)
    stores.runs.cancel(run.id)
    assert not stores.runs.idle()
    stores.runs.finish(run.id, RunStatus.CANCELLED)
    with pytest.raises(ConflictError, match="is cancelled"):
        stores.runs.cancel(run.id)
    assert told(stores) == [
        ("run.requested", {"id": run.id, "trigger": "manual"}),
        ("run.cancelled", {"id": run.id}),
    ]


def test_keys_made_and_revoked_are_logged(
    stores: Stores, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_REDIS_URL", redis_server.url)
    made = NewApiKey.model_validate_json(
        CliRunner().invoke(app, ["keys", "create", "ci", "--scope", "read", "--scope", "edit", "--json"]).stdout
    )
    stores.keys.revoke(made.id)
    stores.keys.revoke(made.id)
    assert told(stores) == [
        ("key.created", {"id": made.id, "name": "ci", "scopes": "edit read"}),
        ("key.revoked", {"id": made.id, "name": "ci"}),
    ]
    assert [entry.actor for entry in entries(stores)] == ["cli", "errata"]


def test_a_run_that_publishes_its_version_is_named(
    stores: Stores, worker: ScriptedWorker, reconciler: Reconciler
) -> None:
    stores.edits.submit([fact("a", "1")])
    reconciler.pull()
    run, version = worker.train()
    reconciler.publish(run.id)
    [moved] = [entry for entry in entries(stores) if entry.version == version and entry.action == "version.activated"]
    assert (moved.actor, moved.run) == ("errata", run.id)


def test_the_log_is_never_trimmed(settings: Settings, stores: Stores) -> None:
    few = Stores.connect(settings.model_copy(update={"events_max": 100}))
    for number in range(400):
        few.edits.submit([fact(f"p{number}", "t")])
    assert few.redis.xlen("errata:events") < 400, "the event stream is"
    assert few.redis.xlen("errata:audit") == 400
    few.redis.close()


def test_pages_are_newest_first_and_complete(stores: Stores) -> None:
    for number in range(5):
        stores.edits.submit([fact(f"p{number}", "t")])
    everything = stores.audit.page(after=None, limit=5)
    assert not everything.has_more
    first = stores.audit.page(after=None, limit=3)
    second = stores.audit.page(after=first.data[-1].id, limit=3)
    assert (first.has_more, second.has_more) == (True, False)
    assert first.data + second.data == everything.data
    assert [entry.id for entry in everything.data] == sorted((entry.id for entry in everything.data), reverse=True)


@pytest.fixture(scope="module")
def base_url(redis_server: RedisServer, tokenizer_folder: Path) -> Iterator[str]:
    with listening(ScriptedNode()) as node:
        settings = Settings(
            redis_url=redis_server.url,
            model=str(tokenizer_folder),
            nodes=(node,),
            edit_max_tokens=64,
            auth="required",
        )
        with serving(settings) as url:
            yield url


@pytest.fixture
def key(stores: Stores) -> NewApiKey:
    return stores.keys.create("ops", list(Scope))


@pytest.fixture
def api(base_url: str, key: NewApiKey) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {key.key}", "x-request-id": "mine"}
    with httpx.Client(base_url=base_url, headers=headers, timeout=15) as client:
        yield client


def test_each_entry_names_key_and_request(
    api: httpx.Client, stores: Stores, worker: ScriptedWorker, key: NewApiKey
) -> None:
    stores.registry.commit(record(1, state=VersionState.VERIFIED), [], token=None)
    before = len(entries(stores))
    edit = api.post("/edits", json={"prompt": "p", "target": "t"}).json()["id"]
    batch = [
        item["id"] for item in api.post("/edits/batch", json={"edits": [{"prompt": "q", "target": "t"}]}).json()["data"]
    ]
    lines = "".join(json.dumps({"prompt": f"r{number}", "target": "t"}) + "\n" for number in range(3))
    assert api.post("/edits/import", content=lines).json()["accepted"] == 3
    api.delete(f"/edits/{edit}")
    api.post("/versions/1/activate")
    api.post("/rollback")
    run = stores.runs.queued()
    assert run is not None
    api.post(f"/runs/{run.id}/cancel")
    made = entries(stores)[before:]
    assert [entry.action for entry in made] == [
        "edits.submitted",
        "run.requested",
        "edits.submitted",
        "edits.submitted",
        "edit.retracted",
        "version.activated",
        "version.rolled_back",
        "run.cancelled",
    ]
    assert {(entry.actor, entry.actor_name, entry.request_id) for entry in made} == {(key.id, "ops", "mine")}
    assert (made[0].data, made[2].data) == ({"ids": [edit]}, {"ids": batch})
    assert len(made[3].data["ids"]) == 3
    listed = api.get("/audit", params={"limit": len(made)}).json()
    assert listed["has_more"]
    assert [AuditEntry.model_validate(entry) for entry in listed["data"]] == made[::-1]


async def test_the_asynchronous_sdk_pages_through_the_log(base_url: str, stores: Stores, key: NewApiKey) -> None:
    [edit] = stores.edits.submit([fact("a", "1")])
    async with AsyncErrataClient(base_url, api_key=key.key) as client:
        page = await client.audit(limit=1)
        older = await client.audit(after=page.data[0].id)
    assert [entry.data for entry in page.data] == [{"ids": [edit.id]}]
    assert [entry.action for entry in older.data] == ["key.created"]


def test_a_keys_secret_is_in_no_entry(api: httpx.Client, key: NewApiKey) -> None:
    api.post("/edits", json={"prompt": "p", "target": "t"})
    listed = api.get("/audit").text
    assert listed.count(key.id) >= 2, "it was created, and has submitted"
    assert key.key.rpartition("_")[2] not in listed


def test_wrong_pages_are_refused(api: httpx.Client) -> None:
    assert_error(api.get("/audit", params={"after": "x"}), 422, param="after")
    assert_error(api.get("/audit", params={"limit": 0}), 422, param="limit")


def test_the_command_lists_entries_and_how_to_go_on(base_url: str, api: httpx.Client, key: NewApiKey) -> None:
    edits = [{"prompt": f"p{number}", "target": "t"} for number in range(5)]
    ids = [edit["id"] for edit in api.post("/edits/batch", json={"edits": edits}).json()["data"]]
    environment = {"ERRATA_API_KEY": key.key}
    words = ["audit", "--url", base_url]
    listed = CliRunner().invoke(app, words, env=environment).stdout
    assert f"{ids[0]} and 4 more" in listed
    assert "edits.submitted" in listed
    assert " ops " in listed
    page = json.loads(CliRunner().invoke(app, [*words, "--json", "--limit", "1"], env=environment).stdout)
    assert page["has_more"]
    more = CliRunner().invoke(app, [*words, "--limit", "1"], env=environment)
    assert more.stderr == f"more: --after {page['data'][0]['id']}\n"


def test_on_an_open_address_nobody_is_named(redis_server: RedisServer, tokenizer_folder: Path, stores: Stores) -> None:
    with serving(Settings(redis_url=redis_server.url, model=str(tokenizer_folder))) as url:
        httpx.post(f"{url}/edits", json={"prompt": "p", "target": "t"}, headers={"x-request-id": "mine"})
    first = entries(stores)[0]
    assert (first.actor, first.actor_name, first.request_id) == ("anonymous", None, "mine")
