"""Edits that wait for another key: over the real application, a real Redis and real sockets."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from redis_server import RedisServer
from scripted_node import ScriptedNode, listening
from scripted_worker import ScriptedWorker, fact
from service_process import assert_error, serving
from typer.testing import CliRunner

from service.api_keys import NewApiKey, Scope
from service.cli import app
from service.client import AsyncErrataClient
from service.schemas import EditStatus, Trigger
from service.settings import Settings
from service.stores import Stores

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def base_url(redis_server: RedisServer, tokenizer_folder: Path) -> Iterator[str]:
    with listening(ScriptedNode()) as node:
        settings = Settings(
            redis_url=redis_server.url,
            model=str(tokenizer_folder),
            nodes=(node,),
            edit_max_tokens=64,
            auth="required",
            review=True,
        )
        with serving(settings) as url:
            yield url


@pytest.fixture
def proposers(stores: Stores) -> NewApiKey:
    return stores.keys.create("proposer", [Scope.EDIT, Scope.READ])


@pytest.fixture
def reviewers(stores: Stores) -> NewApiKey:
    return stores.keys.create("reviewer", [Scope.EDIT])


def client(base_url: str, key: NewApiKey) -> httpx.Client:
    return httpx.Client(base_url=base_url, headers={"Authorization": f"Bearer {key.key}"}, timeout=15)


@pytest.fixture
def proposer(base_url: str, proposers: NewApiKey) -> Iterator[httpx.Client]:
    with client(base_url, proposers) as made:
        yield made


@pytest.fixture
def reviewer(base_url: str, reviewers: NewApiKey) -> Iterator[httpx.Client]:
    with client(base_url, reviewers) as made:
        yield made


def proposed(proposer: httpx.Client, prompt: str = "p", target: str = "t") -> str:
    response = proposer.post("/edits", json={"prompt": prompt, "target": target})
    assert (response.status_code, response.json()["status"]) == (202, "proposed")
    edit_id: str = response.json()["id"]
    return edit_id


def test_nothing_is_learned_before_another_key_agrees(
    proposer: httpx.Client, reviewer: httpx.Client, stores: Stores, worker: ScriptedWorker, proposers: NewApiKey
) -> None:
    edit_id = proposed(proposer)
    assert stores.runs.queued() is None, "no run for what is only proposed"
    assert stores.edits.claim("run_1").members == []
    own = proposer.post(f"/edits/{edit_id}/approve")
    assert_error(own, 403, code="own_proposal")
    assert stores.edits.get(edit_id).status is EditStatus.PROPOSED
    approved = reviewer.post(f"/edits/{edit_id}/approve")
    assert (approved.status_code, approved.json()["status"]) == (202, "queued")
    assert stores.runs.queued() is not None
    assert [edit.id for edit in worker.begin()[1]] == [edit_id]
    assert_error(reviewer.post(f"/edits/{edit_id}/approve"), 409, code="edit_not_proposed")
    last = next(entry for entry in stores.audit.page(after=None, limit=9).data if entry.action == "edit.approved")
    assert (last.actor_name, last.data) == ("reviewer", {"id": edit_id, "proposer": proposers.id})


def test_batches_and_imports_wait_too(proposer: httpx.Client, stores: Stores) -> None:
    proposer.post("/edits/batch", json={"edits": [{"prompt": "a", "target": "t"}]})
    proposer.post("/edits/import", content='{"prompt": "b", "target": "t"}\n')
    listed = proposer.get("/edits", params={"status": "proposed"}).json()["data"]
    assert [edit["prompt"] for edit in listed] == ["b", "a"]
    assert [entry.action for entry in stores.audit.page(after=None, limit=2).data] == ["edits.proposed"] * 2


def test_a_proposal_supersedes_only_when_it_is_approved(
    proposer: httpx.Client, reviewer: httpx.Client, stores: Stores, worker: ScriptedWorker
) -> None:
    first, second = proposed(proposer, "p", "one"), proposed(proposer, "p", "two")
    reviewer.post(f"/edits/{second}/approve")
    assert [stores.edits.get(edit_id).status for edit_id in (first, second)] == ["proposed", "queued"]
    reviewer.post(f"/edits/{first}/approve")
    assert [stores.edits.get(edit_id).status for edit_id in (first, second)] == ["queued", "superseded"]
    assert stores.edits.get(second).superseded_by == first
    proposed(proposer, "p", "three")
    assert stores.edits.get(first).status is EditStatus.QUEUED


def test_an_edit_waits_to_be_learned_from_its_approval_on(
    proposer: httpx.Client, reviewer: httpx.Client, stores: Stores
) -> None:
    edit_id = proposed(proposer)
    stores.redis.hset(f"errata:edit:{edit_id}", "accepted_at", 1)
    reviewer.post(f"/edits/{edit_id}/approve")
    assert stores.edits.oldest_accepted_at([EditStatus.QUEUED])[EditStatus.QUEUED] > time.time() - 30


def test_a_proposal_is_taken_back_at_once(proposer: httpx.Client, reviewer: httpx.Client, stores: Stores) -> None:
    edit_id = proposed(proposer)
    assert proposer.delete(f"/edits/{edit_id}").json()["status"] == "retracted"
    assert proposer.delete(f"/edits/{edit_id}").json()["status"] == "retracted"
    assert_error(reviewer.post(f"/edits/{edit_id}/approve"), 409, code="edit_not_proposed")
    assert stores.runs.queued() is None


def test_a_cancelled_run_is_not_woken_by_a_proposal(
    proposer: httpx.Client, reviewer: httpx.Client, stores: Stores
) -> None:
    [waiting] = stores.edits.submit([fact("waiting", "t")])
    stores.runs.cancel(stores.runs.request(Trigger.MANUAL)[0].id)
    edit_id = proposed(proposer)
    assert not stores.runs.idle()
    assert stores.runs.queued() is None
    reviewer.post(f"/edits/{edit_id}/approve")
    assert stores.runs.queued() is not None
    assert stores.edits.get(waiting.id).status is EditStatus.QUEUED


async def test_the_sdk_and_the_command(base_url: str, proposer: httpx.Client, reviewers: NewApiKey) -> None:
    first, second = proposed(proposer, "a"), proposed(proposer, "b")
    async with AsyncErrataClient(base_url, api_key=reviewers.key) as sdk:
        assert (await sdk.approve(first)).status is EditStatus.QUEUED
    words = ["approve", second, "--url", base_url]
    assert CliRunner().invoke(app, words, env={"ERRATA_API_KEY": reviewers.key}).stdout == f"{second}  queued\n"
