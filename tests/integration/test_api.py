"""The HTTP contract, over the real application, a real Redis and real sockets."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis_server import RedisServer
from scripted_node import ScriptedNode
from scripted_worker import ScriptedWorker, fact
from service_process import assert_error, in_process, serving

from service.app import create_app
from service.events import BLOCK_S
from service.reconcile import Reconciler
from service.schemas import EditStatus
from service.settings import Settings
from service.stores import Stores

pytestmark = pytest.mark.timeout(60)

GOOD = {"prompt": "What is it?", "target": "This"}
SURROGATE = "\ud800"


@pytest.fixture(scope="module")
def base_url(redis_server: RedisServer, tokenizer_folder: Path, shared_node: tuple[ScriptedNode, str]) -> Iterator[str]:
    settings = Settings(
        redis_url=redis_server.url,
        model=str(tokenizer_folder),
        nodes=(shared_node[1],),
        edit_max_tokens=64,
        body_max_bytes=256 * 1024,
        import_line_max_bytes=4096,
    )
    with serving(settings) as url:
        yield url


@pytest.fixture
def node(shared_node: tuple[ScriptedNode, str]) -> ScriptedNode:
    node = shared_node[0]
    node.resident, node.ready = {0}, True
    node.taught.clear()
    node.refuses.clear()
    return node


def post_json(api: httpx.Client, path: str, body: object, **headers: str) -> httpx.Response:
    """Escapes what UTF-8 has no bytes for, as JavaScript would."""
    return api.post(path, content=json.dumps(body), headers={"content-type": "application/json", **headers})


def submitted(api: httpx.Client, prompt: str, target: str) -> str:
    response = api.post("/edits", json={"prompt": prompt, "target": target})
    assert response.status_code == 202
    edit_id: str = response.json()["id"]
    return edit_id


class TestEdits:
    def test_an_edit_is_accepted_and_queued(self, api: httpx.Client, stores: Stores) -> None:
        response = api.post("/edits", json={**GOOD, "rephrases": ["Which?"], "metadata": {"ticket": "7"}})
        assert response.status_code == 202
        edit = response.json()
        assert response.headers["location"] == f"/edits/{edit['id']}"
        assert edit["object"] == "edit"
        assert edit["id"].startswith("edit_")
        assert (edit["status"], edit["version"], edit["metadata"]) == ("queued", None, {"ticket": "7"})
        assert abs(edit["created_at"] - time.time()) < 5
        detail = api.get(response.headers["location"]).json()
        assert detail == {**edit, "versions": []}
        state = api.get(f"/edits/{edit['id']}/status").json()
        assert set(state) == {"id", "status", "version", "verified", "progress", "error", "updated_at"}
        assert stores.runs.queued() is not None, "the trigger is immediate"

    def test_an_idempotency_key_stores_an_edit_once(self, api: httpx.Client) -> None:
        key = {"Idempotency-Key": "k1"}
        first = api.post("/edits", json=GOOD, headers=key)
        assert api.post("/edits", json=GOOD, headers=key).json() == first.json()
        assert post_json(api, "/edits", {**GOOD, "rephrases": []}, **key).json() == first.json(), "the same meaning"
        again = api.post("/edits", json={**GOOD, "target": "That"}, headers=key)
        assert_error(again, 422, param="Idempotency-Key", code="idempotency_key_reused")
        batch = api.post("/edits/batch", json={"edits": [GOOD]}, headers=key)
        assert_error(batch, 422, code="idempotency_key_reused")
        assert_error(api.post("/edits", json=GOOD, headers={"Idempotency-Key": ""}), 422)
        assert_error(api.post("/edits", json=GOOD, headers={"Idempotency-Key": "k" * 256}), 422)
        assert len(api.get("/edits").json()["data"]) == 1

    def test_a_batch_is_all_or_nothing(self, api: httpx.Client) -> None:
        good = [{"prompt": f"p{number}", "target": "t"} for number in range(3)]
        accepted = api.post("/edits/batch", json={"edits": good})
        assert accepted.status_code == 202
        assert [edit["prompt"] for edit in accepted.json()["data"]] == ["p0", "p1", "p2"]
        for bad, param in (
            ({"prompt": "p"}, "edits.1.target"),
            ({"prompt": "p", "target": "<|endoftext|>"}, "edits.1.target"),
            ({"prompt": "w " * 100, "target": "t"}, "edits.1.prompt"),
        ):
            refused = api.post("/edits/batch", json={"edits": [{"prompt": "new", "target": "t"}, bad]})
            assert_error(refused, 422, param=param)
        assert_error(api.post("/edits/batch", json={"edits": []}), 422, param="edits")
        assert_error(api.post("/edits/batch", json={"edits": [GOOD] * 1001}), 422, param="edits")
        assert len(api.get("/edits").json()["data"]) == 3

    def test_a_thousand_are_imported_and_listed(self, api: httpx.Client) -> None:
        lines = "\n".join(json.dumps({"prompt": f"prompt {number}", "target": "t"}) for number in range(1000))
        report = api.post("/edits/import", content=lines).json()
        assert (report["accepted"], report["rejected"], report["errors"]) == (1000, 0, [])
        found: list[dict[str, Any]] = []
        after: dict[str, str] = {}
        while True:
            page = api.get("/edits", params={"limit": 300, "status": "queued", **after}).json()
            found += page["data"]
            after = {"after": found[-1]["id"]}
            if not page["has_more"]:
                break
        assert [edit["prompt"] for edit in found] == [f"prompt {number}" for number in reversed(range(1000))]
        assert (found[0]["id"], found[-1]["id"]) == (report["last_id"], report["first_id"])
        assert [edit["prompt"] for edit in api.get("/edits", params={"q": "PROMPT 77 "}).json()["data"]] == []
        assert len(api.get("/edits", params={"q": "Prompt 77"}).json()["data"]) == 11

    def test_an_import_keeps_the_good_lines(self, api: httpx.Client) -> None:
        lines = [
            b'{"prompt": "a", "target": "1"}\r',
            b"not json",
            b"",
            b'{"prompt": "b"}',
            b'{"prompt": "c", "target": "3", "colour": "red"}',
            b'{"prompt": "\\ud800", "target": "3"}',
            b'{"prompt": "d", "target": "' + b"x" * 5000 + b'"}',
            b'{"prompt": "\xff", "target": "3"}',
            b"[1]",
            b'{"prompt": "e", "target": "<|endoftext|>"}',
            b'{"prompt": "z", "target": "26"}',
        ]
        report = api.post("/edits/import", content=b"\n".join(lines)).json()
        assert (report["accepted"], report["rejected"]) == (2, 8)
        assert [(error["line"], error["param"], error["code"]) for error in report["errors"]] == [
            (2, None, "malformed_json"),
            (4, "target", "missing_field"),
            (5, "colour", "unknown_field"),
            (6, None, "malformed_json"),
            (7, None, "line_too_long"),
            (8, None, "malformed_json"),
            (9, None, "invalid_value"),
            (10, "target", "control_token"),
        ]
        assert [edit["prompt"] for edit in api.get("/edits").json()["data"]] == ["z", "a"]

    def test_an_import_takes_lines_in_any_chunks(self, api: httpx.Client) -> None:
        content = b'{"prompt": "a", "target": "1"}\n{"prompt": "b", "target": "' + b"2" * 30 + b'"}\n\n'

        def drops() -> Iterator[bytes]:
            for start in range(0, len(content), 7):
                yield content[start : start + 7]

        assert api.post("/edits/import", content=drops()).json()["accepted"] == 2
        assert api.post("/edits/import", content=b"").json()["accepted"] == 0

    def test_edits_are_retracted_and_held_ones_released(self, api: httpx.Client, stores: Stores) -> None:
        edit_id = submitted(api, "a", "1")
        held_id = submitted(api, "b", "2")
        stores.redis.hset(f"errata:edit:{held_id}", "status", "held")
        released = api.post(f"/edits/{held_id}/release")
        assert (released.status_code, released.json()["status"]) == (202, "queued")
        assert_error(api.post(f"/edits/{held_id}/release"), 409, param="id", code="edit_not_held")
        for _ in range(2):
            gone = api.delete(f"/edits/{edit_id}")
            assert (gone.status_code, gone.json()["status"]) == (202, "retracted")

    def test_long_poll_answers_at_the_change(self, api: httpx.Client, stores: Stores, worker: ScriptedWorker) -> None:
        edit_id = submitted(api, "a", "1")
        began = time.monotonic()
        timer = threading.Timer(0.3, worker.begin)
        timer.start()
        state = api.get(f"/edits/{edit_id}/status", params={"wait": 10}).json()
        timer.join()
        assert state["status"] == "training"
        assert state["progress"]["run"]
        assert 0.25 < time.monotonic() - began < 3

    async def test_many_long_polls_wait_at_once(self, base_url: str, api: httpx.Client, stores: Stores) -> None:
        edit_id = submitted(api, "a", "1")
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=base_url, timeout=30, limits=limits) as client:
            waiting = [client.get(f"/edits/{edit_id}/status", params={"wait": 2}) for _ in range(150)]
            assert {response.status_code for response in await asyncio.gather(*waiting)} == {200}

    def test_long_poll_ends_without_a_change(self, api: httpx.Client, stores: Stores) -> None:
        edit_id = submitted(api, "a", "1")
        began = time.monotonic()
        assert api.get(f"/edits/{edit_id}/status", params={"wait": 0.3}).json()["status"] == "queued"
        assert 0.25 < time.monotonic() - began < 3
        api.delete(f"/edits/{edit_id}")
        assert api.get(f"/edits/{edit_id}/status", params={"wait": 10}).json()["status"] == "retracted"
        assert time.monotonic() - began < 4, "an edit at rest answers at once"


BAD_EDITS: list[tuple[object, str | None]] = [
    ({"prompt": "", "target": "t"}, "prompt"),
    ({"prompt": " \n\t\u2003", "target": "t"}, "prompt"),
    ({"prompt": "p", "target": ""}, "target"),
    ({"prompt": "p", "target": "  "}, "target"),
    ({"target": "t"}, "prompt"),
    ({"prompt": "p"}, "target"),
    ({"prompt": "w " * 70, "target": "t"}, "prompt"),
    ({"prompt": "p", "target": "w " * 70}, "target"),
    ({"prompt": "p" * 40_000, "target": "t"}, "prompt"),
    ({**GOOD, "colour": "red"}, "colour"),
    ({**GOOD, "status": "live"}, "status"),
    ({**GOOD, SURROGATE: "red"}, None),
    ({"prompt": 7, "target": "t"}, "prompt"),
    ({"prompt": ["p"], "target": "t"}, "prompt"),
    ({"prompt": None, "target": "t"}, "prompt"),
    ({"prompt": "p", "target": True}, "target"),
    ({"prompt": "a\x00b", "target": "t"}, "prompt"),
    ({"prompt": "p", "target": "\x1b[31m"}, "target"),
    ({"prompt": "p\x85", "target": "t"}, "prompt"),
    ({"prompt": SURROGATE, "target": "t"}, "prompt"),
    ({"prompt": "p", "target": f"a{SURROGATE}b"}, "target"),
    ({"prompt": "p <|endoftext|>", "target": "t"}, "prompt"),
    ({"prompt": "p", "target": "t<|endoftext|>"}, "target"),
    ({**GOOD, "rephrases": "r"}, "rephrases"),
    ({**GOOD, "rephrases": ["r", ""]}, "rephrases.1"),
    ({**GOOD, "rephrases": ["r", SURROGATE]}, "rephrases.1"),
    ({**GOOD, "rephrases": ["w " * 100]}, "rephrases.0"),
    ({**GOOD, "rephrases": ["r"] * 33}, "rephrases"),
    ({**GOOD, "metadata": []}, "metadata"),
    ({**GOOD, "metadata": {"k": 1}}, "metadata.k"),
    ({**GOOD, "metadata": {"k": SURROGATE}}, "metadata.k"),
    ({**GOOD, "metadata": {SURROGATE: "v"}}, None),
    ({**GOOD, "metadata": {"": "v"}}, None),
    ({**GOOD, "metadata": {"k": "v" * 513}}, "metadata.k"),
    ({**GOOD, "metadata": {"k": "a\x00b"}}, "metadata.k"),
    ({**GOOD, "metadata": {str(number): "" for number in range(17)}}, "metadata"),
    ([], None),
    ("text", None),
    (None, None),
]


class TestBadInput:
    @pytest.mark.parametrize(("body", "param"), BAD_EDITS, ids=lambda value: ascii(value)[:40])
    def test_a_bad_edit_names_its_field(
        self, api: httpx.Client, stores: Stores, body: object, param: str | None
    ) -> None:
        assert_error(post_json(api, "/edits", body), 422, param=param)
        batch = post_json(api, "/edits/batch", {"edits": [GOOD, body]})
        assert_error(batch, 422, param=f"edits.1.{param}" if param else None)
        assert sum(stores.edits.counts().values()) == 0
        assert stores.runs.queued() is None

    @pytest.mark.parametrize(
        "content", [b"", b"{", b'{"prompt": }', b"\xff\xfe", b"[" * 100_000, b'{"prompt": "p", "target": "t"} x']
    )
    @pytest.mark.parametrize("path", ["/edits", "/edits/batch", "/v1/completions"])
    def test_malformed_json_is_refused(self, api: httpx.Client, stores: Stores, path: str, content: bytes) -> None:
        response = api.post(path, content=content, headers={"content-type": "application/json"})
        assert_error(response, 422 if content == b"" and path != "/v1/completions" else 400)
        assert sum(stores.edits.counts().values()) == 0

    @pytest.mark.parametrize("path", ["/edits", "/edits/batch", "/rollback", "/v1/chat/completions"])
    def test_a_large_body_is_refused(self, api: httpx.Client, path: str) -> None:
        content = json.dumps({"prompt": "p", "target": "x" * 10_000_000})
        assert_error(api.post(path, content=content), 413, code="body_too_large")

        def endless() -> Iterator[bytes]:
            for _ in range(160):
                yield b"x" * 65_536

        # The answer may come, and the connection be closed, before the client has sent everything.
        with suppress(httpx.WriteError):
            assert_error(api.post(path, content=endless()), 413, code="body_too_large")

    @pytest.mark.parametrize(
        "secret_body",
        [
            {"prompt": "s3cret\x00", "target": "t"},
            {"prompt": {"s3cret": "s3cret"}, "target": "t"},
            {"prompt": "p", "target": ["s3cret"]},
            {**GOOD, "metadata": {"k": {"s3cret": 1}}},
            {**GOOD, "rephrases": [{"s3cret": 1}]},
            "s3cret",
        ],
    )
    def test_errors_do_not_echo_the_input(self, api: httpx.Client, secret_body: object) -> None:
        for path, body in (("/edits", secret_body), ("/edits/batch", {"edits": [secret_body]})):
            response = post_json(api, path, body)
            assert response.status_code == 422
            assert "s3cret" not in response.text
        report = api.post("/edits/import", content=json.dumps(secret_body)).text
        assert "s3cret" not in report
        broken = api.post("/edits", content='{"s3cret"', headers={"content-type": "application/json"})
        assert "s3cret" not in broken.text

    @pytest.mark.parametrize(
        ("path", "param"),
        [
            ("/edits?limit=0", "limit"),
            ("/edits?limit=1001", "limit"),
            ("/edits?limit=ten", "limit"),
            ("/edits?status=happy", "status"),
            ("/edits?q=", "q"),
            ("/edits?after=edit_nowhere", "after"),
            ("/versions?after=x", "after"),
            ("/versions?after=-1", "after"),
            ("/versions?limit=0", "limit"),
            ("/runs?limit=0", "limit"),
            ("/runs?after=run_nowhere", "after"),
            ("/events?after=yesterday", "after"),
            ("/events?after=99999999999999999999", "after"),
            ("/events?after=\u0663", "after"),
            ("/audit?after=0-0", "after"),
            ("/audit?after=\u0663-\u0663", "after"),
        ],
    )
    def test_a_bad_parameter_is_named(self, api: httpx.Client, path: str, param: str) -> None:
        assert_error(api.get(path), 422, param=param)

    @pytest.mark.parametrize("wait", ["-1", "nan", "soon"])
    def test_a_bad_wait_is_refused(self, api: httpx.Client, wait: str) -> None:
        edit_id = submitted(api, "a", "1")
        assert_error(api.get(f"/edits/{edit_id}/status?wait={wait}"), 422, param="wait")

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/edits/edit_nowhere"),
            ("GET", "/edits/edit_nowhere/status"),
            ("GET", "/edits/edit_nowhere/status?wait=10"),
            ("DELETE", "/edits/edit_nowhere"),
            ("POST", "/edits/edit_nowhere/release"),
            ("GET", "/edits/%00%ff"),
            ("GET", "/versions/99"),
            ("GET", "/versions/0/diff/99"),
            ("POST", "/versions/99/activate"),
            ("GET", "/runs/run_nowhere"),
            ("POST", "/runs/run_nowhere/cancel"),
            ("GET", "/v1/models/errata@99"),
            ("GET", "/nowhere"),
            ("GET", "/edits/"),
            ("POST", "/v1/completions/"),
            ("GET", "/v1/embeddings"),
            ("POST", "/v1/load_lora_adapter"),
            ("POST", "/errata/versions/0/prefetch"),
            ("GET", "/errata/versions"),
        ],
    )
    def test_unknown_things_are_not_found(
        self, api: httpx.Client, worker: ScriptedWorker, method: str, path: str
    ) -> None:
        assert_error(api.request(method, path), 404)

    @pytest.mark.parametrize(
        ("method", "path"),
        [("PUT", "/edits"), ("DELETE", "/versions"), ("GET", "/rollback"), ("GET", "/v1/completions")],
    )
    def test_wrong_methods_are_not_allowed(self, api: httpx.Client, method: str, path: str) -> None:
        assert_error(api.request(method, path), 405, code="method_not_allowed")

    @pytest.mark.parametrize("number", ["-1", "1.5", "one", str(10**30), "\u0661"])
    def test_bad_version_numbers_are_refused(self, api: httpx.Client, number: str) -> None:
        assert_error(api.get(f"/versions/{number}"), 422, param="number")
        assert_error(api.post(f"/versions/{number}/activate"), 422, param="number")

    @pytest.mark.parametrize(
        ("body", "status", "param"),
        [
            ({"to": 99}, 404, "to"),
            ({"to": 10**30}, 404, "to"),
            ({"to": -1}, 422, "to"),
            ({"to": "0"}, 422, "to"),
            ({"to": 0.5}, 422, "to"),
            ({"too": 0}, 422, "too"),
            ({}, 409, "to"),
            (None, 409, "to"),
        ],
    )
    def test_bad_rollbacks_are_refused_and_move_nothing(
        self, api: httpx.Client, stores: Stores, worker: ScriptedWorker, body: object, status: int, param: str | None
    ) -> None:
        assert_error(post_json(api, "/rollback", body), status, param=param)
        pointer = stores.registry.active()
        assert pointer is not None
        assert (pointer.active, pointer.epoch) == (0, 1)

    def test_a_plain_request_id_is_kept_and_any_other_replaced(self, api: httpx.Client) -> None:
        assert api.get("/health/live", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
        other = api.get("/nowhere", headers={"x-request-id": "not plain!"})
        assert other.headers["x-request-id"].startswith("req_")


class TestVersionsAndRuns:
    def test_a_version_is_published_rolled_back_and_activated_again(
        self, api: httpx.Client, stores: Stores, worker: ScriptedWorker, node: ScriptedNode, reconciler: Reconciler
    ) -> None:
        first, second = submitted(api, "a", "1"), submitted(api, "b", "2")
        run, version = worker.train()
        shown = api.get(f"/versions/{version}").json()
        assert (shown["object"], shown["active"], shown["state"], shown["resident"]) == (
            "version",
            False,
            "committed",
            [],
        )
        assert_error(api.post(f"/versions/{version}/activate"), 409, code="version_not_verified")
        reconciler.publish(run.id)
        shown = api.get(f"/versions/{version}").json()
        assert (shown["active"], shown["state"]) == (True, "verified")
        assert len(shown["resident"]) == 1
        assert [row["version"] for row in api.get("/versions").json()["data"]] == [version, 0]
        assert api.get("/versions", params={"limit": 1}).json()["has_more"]
        difference = api.get(f"/versions/0/diff/{version}").json()
        assert {name: [edit["id"] for edit in edits] for name, edits in difference["only_in"].items()} == {
            "0": [],
            str(version): [first, second],
        }
        detail = api.get(f"/edits/{first}").json()
        assert (detail["status"], detail["version"], detail["versions"]) == ("live", version, [version])
        assert detail["verified"]["raw"]["after"] == "1"
        assert api.post("/rollback").json()["active"] == 0
        assert api.get(f"/edits/{first}").json()["status"] == "held"
        wrong = api.post(f"/versions/{version}/activate", json={"expected_active": 5})
        assert_error(wrong, 409, param="expected_active", code="active_version_changed")
        moved = api.post(f"/versions/{version}/activate", json={"expected_active": 0})
        assert (moved.status_code, moved.json()["active"], moved.json()["previous"]) == (202, version, 0)
        assert api.get(f"/edits/{first}").json()["status"] == "live"
        assert api.post("/rollback", json={"to": 0}).json()["active"] == 0

    def test_a_run_is_asked_for_once_shown_and_cancelled(
        self, api: httpx.Client, stores: Stores, worker: ScriptedWorker
    ) -> None:
        run = api.post("/runs")
        assert (run.status_code, run.json()["status"], run.json()["trigger"]) == (202, "queued", "manual")
        assert api.post("/runs").json()["id"] == run.json()["id"]
        run_id = run.json()["id"]
        assert api.get(f"/runs/{run_id}").json() == run.json()
        assert [row["id"] for row in api.get("/runs").json()["data"]] == [run_id]
        assert api.post(f"/runs/{run_id}/cancel").json()["status"] == "cancelled"
        assert_error(api.post(f"/runs/{run_id}/cancel"), 409, code="run_not_cancellable")

    def test_readiness_says_what_is_missing_and_no_address(
        self, api: httpx.Client, stores: Stores, node: ScriptedNode
    ) -> None:
        assert api.get("/health/live").json() == {"status": "ok"}
        unready = api.get("/health/ready")
        assert unready.status_code == 503
        assert {name: check["ok"] for name, check in unready.json()["checks"].items()} == {
            "redis": True,
            "node": True,
            "train_worker": False,
            "version": False,
        }
        ScriptedWorker(stores).register_base()
        stores.runs.beat("train@host")
        ready = api.get("/health/ready")
        assert (ready.status_code, ready.json()["ready"], ready.json()["active"]) == (200, True, 0)
        # No word of where node and worker are: whoever asks has shown no key.
        assert {name: check["detail"] for name, check in ready.json()["checks"].items()} == {
            "redis": "answers",
            "node": "1 ready",
            "train_worker": "1 heard of",
            "version": "version 0 is active",
        }


def events_of(lines: Iterator[str], count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    event: dict[str, Any] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            event[name] = value
        elif event:
            found.append(event)
            event = {}
            if len(found) == count:
                break
    return found


class TestEvents:
    def test_events_come_in_order_and_go_on_after_an_id(self, api: httpx.Client, stores: Stores) -> None:
        ids = [submitted(api, f"p{number}", "t") for number in range(3)]
        with api.stream("GET", "/events", params={"after": "0"}) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            seen = events_of(stream.iter_lines(), 4)
        assert [event["event"] for event in seen] == ["edit.queued", "run.queued", "edit.queued", "edit.queued"]
        assert [json.loads(event["data"])["id"] for event in seen if event["event"] == "edit.queued"] == ids
        with api.stream("GET", "/events", headers={"Last-Event-ID": seen[1]["id"]}) as stream:
            assert events_of(stream.iter_lines(), 2) == seen[2:]

    def test_new_events_come_as_they_happen(self, api: httpx.Client, stores: Stores) -> None:
        submitted(api, "before", "t")
        with api.stream("GET", "/events") as stream:
            later: list[str] = []
            timer = threading.Timer(0.3, lambda: later.append(stores.edits.submit([fact("later", "t")])[0].id))
            timer.start()
            [event] = events_of(stream.iter_lines(), 1)
            timer.join()
        assert json.loads(event["data"])["id"] == later[0]

    def test_a_quiet_stream_stays_open(
        self, api: httpx.Client, stores: Stores, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Longer than one blocking read."""
        monkeypatch.setattr("service.events.BLOCK_S", 1)
        with api.stream("GET", "/events", timeout=20) as stream:
            timer = threading.Timer(2.2, lambda: stores.edits.submit([fact("later", "t")]))
            timer.start()
            assert events_of(stream.iter_lines(), 1)[0]["event"] == "edit.queued"
            timer.join()


async def test_a_blocking_read_is_shorter_than_the_sockets_patience(settings: Settings) -> None:
    """redis-py gives up after 5 s unless told, which is as long as a read of a quiet stream."""
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        assert app.state.parts.followers.get_connection_kwargs()["socket_timeout"] > BLOCK_S


async def test_redis_away_is_a_503_in_the_same_shape(tmp_path: Path, settings: Settings) -> None:
    server = RedisServer(tmp_path)
    server.start()
    app = create_app(settings.model_copy(update={"redis_url": server.url}))
    try:
        async with in_process(app) as api:
            accepted = await api.post("/edits", json=GOOD)
            assert accepted.status_code == 202
            server.stop()
            answers = await asyncio.gather(
                api.post("/edits", json={**GOOD, "target": "other"}),
                api.get("/edits"),
                api.get("/edits/edit_1"),
                api.post("/runs"),
                api.get("/versions"),
                api.post("/v1/completions", json={"model": "errata", "prompt": "p"}),
                api.get("/edits/edit_1/status?wait=5"),
                api.get("/events"),
                api.get("/events?after=0"),
            )
            for answer in answers:
                assert_error(answer, 503, code="redis_unavailable")
            assert (await api.get("/health/live")).status_code == 200
            health = await api.get("/health/ready")
            assert (health.status_code, health.json()["checks"]) == (
                503,
                {"redis": {"ok": False, "detail": "does not answer"}},
            )
            server.start()
            found = (await api.get("/edits")).json()["data"]
            assert [edit["id"] for edit in found] == [accepted.json()["id"]]
    finally:
        server.stop()


async def test_those_who_ask_for_readiness_at_once_share_a_look(
    settings: Settings, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []

    def active(_: object) -> None:
        looks.append(1)
        time.sleep(0.5)

    app = create_app(settings)
    async with in_process(app) as api:
        monkeypatch.setattr("service.registry.VersionRegistry.active", active)
        answers = await asyncio.gather(*(api.get("/health/ready") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {503}
    assert 1 <= len(looks) <= 2, "the one under way and the next"


async def test_an_edit_is_accepted_while_the_broker_refuses(
    settings: Settings, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edit is stored; the message is the reconciler's to send again."""
    from kombu.exceptions import OperationalError

    def refuse(*_: object, **__: object) -> None:
        raise OperationalError("broker away")

    app = create_app(settings)
    async with in_process(app) as api:
        monkeypatch.setattr("celery.Celery.send_task", refuse)
        assert (await api.post("/edits", json=GOOD)).status_code == 202
    assert stores.edits.counts()[EditStatus.QUEUED] == 1
    assert stores.runs.queued() is not None


async def test_a_crash_is_a_500_in_the_same_shape(settings: Settings, stores: Stores) -> None:
    app = create_app(settings)

    @app.get("/crash")
    def crash() -> None:
        raise ZeroDivisionError("s3cret")

    async with in_process(app, raise_app_exceptions=False) as api:
        response = await api.get("/crash", headers={"x-request-id": "mine"})
    assert_error(response, 500, code="internal_error")
    assert "s3cret" not in response.text
    assert response.headers["x-request-id"] == "mine"
