"""A file is replaced whole or not at all. What versions' folders need of these functions: test_delta.py."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from worker.folders import write_file

DURABLE = pytest.mark.parametrize("durable", [True, False])


@contextmanager
def full_disk(room_bytes: int) -> Iterator[None]:
    """No file of this process may be larger. The write fails in its midst, as on a disk without room for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@DURABLE
def test_a_file_is_made_with_its_folder_and_replaced(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "file"
    for data in (b"old", b"the new one"):
        write_file(path, data, durable=durable)
        assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


@DURABLE
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        write_file(path, b"x" * 100_000, durable=durable)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@DURABLE
def test_what_cannot_be_renamed_leaves_nothing(tmp_path: Path, durable: bool) -> None:
    (tmp_path / "file" / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_file(tmp_path / "file", b"data", durable=durable)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
