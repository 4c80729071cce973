"""The folder of the prefix cache, which several processes have open, on a disk that may be full."""

import fcntl
import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import lmdb
import pytest

from worker.training.generations import Generations

HALF_BYTES = 1 << 18
Values = dict[bytes, bytes]


def values(name: str, count: int = 8) -> Values:
    return {f"{name} {number}".encode(): name.encode().ljust(3500) for number in range(count)}


def fill(store: Generations, folder: Path) -> None:
    """Put values until the newer generation is another."""
    before = newer(folder)
    for turn in range(100):
        store.put(values(f"filling {turn}"))
        if newer(folder) != before:
            return
    pytest.fail("it is never full")


def newer(folder: Path) -> int:
    return (folder / "newer" / "data.mdb").stat().st_ino


def on_disk(folder: Path, kept: Values) -> Values:
    """Which of these another process finds."""
    other = Other(folder)
    try:
        return other.get(kept)
    finally:
        other.end()


class Other:
    """The same folder in another process: LMDB opens it once in each."""

    def __init__(self, folder: Path, half_bytes: int = HALF_BYTES) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, folder, half_bytes), daemon=True)
        self._process.start()

    def get(self, wanted: Values) -> Values:
        return self._asked("get", list(wanted))

    def put(self, kept: Values) -> None:
        self._asked("put", kept)

    def end(self) -> None:
        self._pipe.send(None)
        self._process.join(timeout=60)

    def ask(self, method: str, argument: object) -> None:
        self._pipe.send((method, argument))

    def answers_within(self, seconds: float) -> bool:
        return self._pipe.poll(seconds)

    def _asked(self, method: str, argument: object) -> Values:
        self.ask(method, argument)
        assert self.answers_within(60)
        answer: Values = self._pipe.recv()
        return answer


def _serve(pipe: Connection, folder: Path, half_bytes: int) -> None:
    store = Generations(folder, half_bytes)
    while request := pipe.recv():
        method, argument = request
        pipe.send(getattr(store, method)(argument))


@pytest.fixture
def another(tmp_path: Path) -> Iterator[Callable[..., Other]]:
    started: list[Other] = []

    def start(**settings: int) -> Other:
        started.append(Other(tmp_path, **settings))
        return started[-1]

    yield start
    for other in started:
        other.end()


def test_who_finds_it_full_after_another_has_made_room_drops_nothing(
    tmp_path: Path, another: Callable[..., Other], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = Generations(tmp_path, HALF_BYTES), another()
    first, theirs, late = values("first"), values("theirs"), values("late")
    mine.put(first)
    write, writes = Generations._write, 0

    def raced(self: Generations, kept: Values) -> None:
        nonlocal writes
        writes += 1
        if writes == 1:
            before = newer(tmp_path)
            while newer(tmp_path) == before:
                other.put(values(f"filling {time.monotonic()}"))
            other.put(theirs)
            raise lmdb.MapFullError("mdb_put")
        write(self, kept)

    monkeypatch.setattr(Generations, "_write", raced)
    mine.put(late)
    assert on_disk(tmp_path, first | theirs | late) == first | theirs | late


def test_what_another_process_keeps_behind_a_rotation_is_seen(tmp_path: Path, another: Callable[..., Other]) -> None:
    mine, other = Generations(tmp_path, HALF_BYTES), another()
    mine.put(values("first"))
    assert other.get(values("first")) == values("first")
    fill(mine, tmp_path)
    late, last = values("late"), values("last")
    mine.put(late)
    assert other.get(late) == late
    other.put(last)
    assert mine.get(list(last)) == last


def test_processes_that_make_room_by_turns_go_on_keeping(tmp_path: Path, another: Callable[..., Other]) -> None:
    mine, other = Generations(tmp_path, HALF_BYTES), another()
    for turn in range(60):
        for store in (mine, other):
            kept = values(f"{turn} {store is mine}")
            store.put(kept)
            assert store.get(kept) == kept
    assert on_disk(tmp_path, kept) == kept


def test_one_process_at_a_time_opens_or_changes_the_folder(tmp_path: Path, another: Callable[..., Other]) -> None:
    running, other = another(), another()
    running.put(values("first"))
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        running.put(values("second"))
        other.ask("get", list(values("first")))
        assert not other.answers_within(1.0)
    assert other.answers_within(60)


def test_a_folder_that_vanishes_is_made_anew(tmp_path: Path) -> None:
    store = Generations(tmp_path / "cache", HALF_BYTES)
    store.put(values("first"))
    shutil.rmtree(tmp_path / "cache")
    for turn in range(60):
        store.put(values(f"{turn}"))
    last = values("last")
    store.put(last)
    assert store.get(last) == last
    assert on_disk(tmp_path / "cache", last) == last


def full(*_: object) -> None:
    raise lmdb.DiskError("mdb_txn_commit", 28)


@pytest.mark.parametrize("moved", [False, True], ids=["newer", "older"])
def test_a_disk_that_was_full_is_read_meanwhile_and_written_again(
    tmp_path: Path, moved: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Generations(tmp_path, HALF_BYTES)
    first, second = values("first"), values("second")
    store.put(first)
    if moved:
        fill(store, tmp_path)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Generations, "_write", full)
        store.put(second)
        store.put(second)
        assert store.get([*first, *second]) == first
    assert caplog.messages == ["prefix_cache.not_kept"]
    store.put(second)
    assert store.get([*first, *second]) == first | second
    monkeypatch.setattr(Generations, "_write", full)
    store.put(first)
    assert caplog.messages == ["prefix_cache.not_kept"] * 2, "what has gone on is told of anew"


def test_a_folder_that_could_not_be_written_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "in the way"
    folder.touch()
    store, kept = Generations(folder, HALF_BYTES), values("first")
    store.put(kept)
    assert store.get(list(kept)) == {}
    folder.unlink()
    store.put(kept)
    assert store.get(list(kept)) == kept


def test_what_a_process_with_a_larger_bound_has_written_is_no_damage(
    tmp_path: Path, another: Callable[..., Other], caplog: pytest.LogCaptureFixture
) -> None:
    mine, other = Generations(tmp_path, HALF_BYTES), another(half_bytes=8 * HALF_BYTES)
    first = values("first")
    mine.put(first)
    large = values("large", 200)
    other.put(large)
    assert mine.get([*first, *large]) == first | large
    small = values("small")
    mine.put(small)
    assert mine.get(list(small)) == small
    assert on_disk(tmp_path, large) == large
    assert not caplog.messages


def test_damage_takes_nothing_from_the_folder_but_the_generations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, kept = Generations(tmp_path, HALF_BYTES), values("first")
    store.put(kept)
    (tmp_path / "covariances").write_text("theirs")
    del store
    gc.collect()
    data = tmp_path / "newer" / "data.mdb"
    os.truncate(data, data.stat().st_size // 2)
    again = Generations(tmp_path, HALF_BYTES)
    assert again.get(list(kept)) == {}
    assert caplog.messages == ["prefix_cache.damaged"]
    assert (tmp_path / "covariances").read_text() == "theirs"
    again.put(kept)
    assert again.get(list(kept)) == kept
