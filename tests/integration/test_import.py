"""Imports of any bytes: each line that is not blank is stored as it was meant, or reported by its number."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as bounds
from hypothesis import strategies as st
from redis_server import RedisServer
from service_process import serving

from service.settings import Settings
from service.stores import Stores

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
