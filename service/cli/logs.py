"""The end of log files, and what is added to them."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

_LOOK_EVERY_S = 0.5


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a file; bytes that are not UTF-8 are shown escaped."""
    with path.open(encoding="utf-8", errors="backslashreplace") as file:
        return [line.rstrip("\n") for line in deque(file, maxlen=count)]


def follow(files: Mapping[str, Path], *, pause: Callable[[float], None] = time.sleep) -> Iterator[tuple[str, str]]:
    """Whole lines written from now on, with their file's name, for ever. A file that is rotated is read anew."""
    offsets = {name: path.stat().st_size for name, path in files.items()}
    while True:
        for name, path in files.items():
            for line in _added(path, offsets, name):
                yield name, line
        pause(_LOOK_EVERY_S)


def _added(path: Path, offsets: dict[str, int], name: str) -> list[str]:
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) < offsets[name]:
                offsets[name] = 0
            file.seek(offsets[name])
            whole, end, _ = file.read().rpartition(b"\n")
    except FileNotFoundError:
        # Between the rotation and the first line after it there is no file.
        return []
    offsets[name] += len(whole) + len(end)
    return whole.decode(errors="backslashreplace").split("\n") if end else []
