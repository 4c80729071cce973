"""Imports: each line that is not blank is stored as it was meant, once, or reported by its number."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as bounds
from hypothesis import strategies as st
from redis_server import RedisServer
from service_process import assert_error, serving

from service.schemas import EditRequest
from service.settings import Settings
from service.stores import Stores
from service.tokens import EditChecker

pytestmark = pytest.mark.timeout(60)

LONGEST = 4096
WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N", "S", "P"]), min_size=1, max_size=12)
GOOD = st.fixed_dictionaries(
    {"prompt": WORDS, "target": WORDS}, optional={"metadata": st.dictionaries(WORDS, WORDS, max_size=3)}
)
ENDINGS = st.sampled_from([b"\n", b"\r\n", b"\n\n", b" \r\n", b"\n\t\n"])

Line = tuple[bytes, dict[str, object] | None]
"""What is sent, and the edit that it means, or None where it means none."""


@st.composite
def good_lines(draw: st.DrawFn) -> Line:
    meant = draw(GOOD)
    line = json.dumps(
        meant, ensure_ascii=draw(st.booleans()), separators=draw(st.sampled_from([(", ", ":"), (",", ": ")]))
    )
    content = draw(st.sampled_from([b"", b" ", b"\t"])) + line.encode()
    return content, meant


BAD_LINES: st.SearchStrategy[Line] = st.one_of(
    st.binary(min_size=1, max_size=40),
    st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=8).map(
        lambda value: json.dumps(value).encode()
    ),
    st.integers(min_value=0).map(lambda depth: b"[" * (depth % 400)),
    WORDS.map(lambda word: json.dumps({"prompt": word, "target": "\ud800"}).encode()),
    WORDS.map(lambda word: json.dumps({"prompt": word, "target": word, "metadata": {"k": 10**300}}).encode()),
    WORDS.map(lambda word: json.dumps({"prompt": word}).encode()),
    WORDS.map(lambda word: b'{"prompt": "' + word.encode() + b'", "target": "\xff\xfe"}'),
    st.just(json.dumps({"prompt": "p", "target": "x" * LONGEST}).encode()),
).map(lambda line: (line, None))


@pytest.fixture(scope="module")
def base_url(redis_server: RedisServer, tokenizer_folder: Path) -> Iterator[str]:
    settings = Settings(
        redis_url=redis_server.url,
        model=str(tokenizer_folder),
        edit_max_tokens=64,
        import_line_max_bytes=LONGEST,
    )
    with serving(settings) as url:
        yield url


def test_accepted_and_rejected_are_all_lines_and_what_is_meant_is_kept(base_url: str, stores: Stores) -> None:
    seen = []

    @bounds(
        max_examples=80, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(
        lines=st.lists(st.tuples(good_lines() | BAD_LINES, ENDINGS, st.booleans()), max_size=8),
        ended=st.booleans(),
        size=st.integers(1, 64),
    )
    def imported(lines: list[tuple[Line, bytes, bool]], ended: bool, size: int) -> None:
        twice = [(line, ending) for line, ending, repeated in lines for _ in range(1 + repeated)]
        content = b"".join(line + ending for (line, _), ending in twice)
        content = content if ended else content.rstrip(b"\r\n")
        pieces = (content[start : start + size] for start in range(0, len(content), size))
        response = client.post("/edits/import", content=pieces)
        assert response.status_code == 202, response.text
        report = response.json()
        told = {number for number, line in enumerate(content.split(b"\n"), 1) if line.strip()}
        assert report["accepted"] + report["rejected"] == len(told)
        assert len(report["errors"]) == report["rejected"]
        assert {error["line"] for error in report["errors"]} <= told
        meant = [edit for (_, edit), _ in twice if edit is not None]
        assert report["accepted"] == len(meant)
        stored = client.get("/edits", params={"limit": len(meant) or 1}).json()["data"][: len(meant)]
        assert [(edit["prompt"], edit["target"], edit["metadata"]) for edit in reversed(stored)] == [
            (edit["prompt"], edit["target"], edit.get("metadata", {})) for edit in meant
        ]
        seen.append((report["accepted"], report["rejected"]))

    with httpx.Client(base_url=base_url, timeout=15) as client:
        imported()
    assert any(accepted and rejected for accepted, rejected in seen)


def good(*numbers: int) -> list[str]:
    return [json.dumps({"prompt": f"p{number}", "target": "t"}) for number in numbers]


def imported(api: httpx.Client, lines: list[str], key: str | None = "k") -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    return api.post("/edits/import", content="".join(f"{line}\n" for line in lines), headers=headers)


def test_a_line_is_checked_in_a_thread(api: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the event loop every stream would wait for it."""
    check, seen = EditChecker.check, []

    def watched(checker: EditChecker, request: EditRequest) -> EditRequest:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        seen.append(request.prompt)
        return check(checker, request)

    monkeypatch.setattr(EditChecker, "check", watched)
    assert imported(api, good(*range(201)), None).json()["accepted"] == 201
    assert len(seen) == 201


def test_a_repeated_import_answers_with_what_it_stored(api: httpx.Client, stores: Stores) -> None:
    lines = ["no JSON", *good(*range(400)), "{}"]
    first = imported(api, lines)
    assert (first.json()["accepted"], first.json()["rejected"]) == (400, 2)
    assert imported(api, lines).json() == first.json()
    assert stores.edits.accepted() == 400
    assert imported(api, lines, "other").json()["first_id"] != first.json()["first_id"]


@pytest.mark.parametrize(
    "other",
    [
        good(1000, *range(1, 400)),
        good(*range(399), 1000),
        good(*range(401)),
        good(*range(200)),
        good(*range(399)),
        [],
        ["no JSON"] * 400,
    ],
    ids=["first line", "last line", "longer", "a chunk shorter", "a line shorter", "empty", "no good line"],
)
def test_another_body_with_the_same_key_is_refused_and_not_stored(
    api: httpx.Client, stores: Stores, other: list[str]
) -> None:
    for key, one, two in (("there", good(*range(400)), other), ("back", other, good(*range(400)))):
        imported(api, one, key)
        before = stores.edits.accepted()
        assert_error(imported(api, two, key), 422, param="Idempotency-Key", code="idempotency_key_reused")
        assert stores.edits.accepted() == before


def test_a_key_of_an_import_is_of_no_other_route(api: httpx.Client, stores: Stores) -> None:
    imported(api, good(1))
    again = api.post("/edits", content=good(1)[0], headers={"Idempotency-Key": "k", "Content-Type": "application/json"})
    assert_error(again, 422, code="idempotency_key_reused")
    assert stores.edits.accepted() == 1


def test_an_import_without_a_good_line_wakes_no_trigger(api: httpx.Client, stores: Stores) -> None:
    imported(api, good(1), None)
    queued = stores.runs.queued()
    assert queued is not None
    stores.runs.cancel(queued.id)
    assert imported(api, ["no JSON"]).json()["rejected"] == 1
    assert stores.runs.queued() is None


def test_what_redis_did_not_take_is_stored_by_the_repetition_and_nothing_twice(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    server = RedisServer(tmp_path)
    server.start()
    settings = Settings(redis_url=server.url, model=str(tokenizer_folder), nodes=("http://127.0.0.1:1",))
    stores = Stores.connect(settings)
    body = "".join(f"{line}\n" for line in good(*range(450))).encode()
    middle = body.index(b'"p250"')

    def broken() -> Iterator[bytes]:
        yield body[:middle]
        while not stores.edits.accepted():
            pass
        server.kill()
        yield body[middle:]

    try:
        with serving(settings) as url, httpx.Client(base_url=url, timeout=60) as client:
            key = {"Idempotency-Key": "k"}
            failed = client.post("/edits/import", content=broken(), headers=key)
            assert_error(failed, 503, code="redis_unavailable")
            server.start()
            stored = stores.edits.accepted()
            assert stored == 200
            report = client.post("/edits/import", content=body, headers=key).json()
            assert (report["accepted"], report["rejected"]) == (450, 0)
            listed = client.get("/edits", params={"limit": 1000}).json()["data"]
        assert [edit["prompt"] for edit in listed] == [f"p{number}" for number in reversed(range(450))]
        assert (listed[-1]["id"], listed[0]["id"]) == (report["first_id"], report["last_id"])
    finally:
        stores.redis.close()
        server.stop()
