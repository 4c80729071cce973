"""Values by key in a folder of bounded size, memory-mapped (LMDB), which processes share. A disk that is full or a file
that is damaged loses values, never more.
"""

import fcntl
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import lmdb

T = TypeVar("T")

log = logging.getLogger(__name__)

_CHECKSUM_BYTES = 4
_NAMES = ("newer", "older")
_TRIES = 3
# Another process, whose bound is larger, has written more than is mapped here; a write that failed half-way.
_MAPPED_ANEW = (lmdb.MapResizedError, lmdb.PanicError)
_DAMAGED = (
    lmdb.CorruptedError,
    lmdb.IncompatibleError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
)


class Generations:
    """Two LMDB environments: what is used moves to the newer one; when that is full, the older one is dropped.

    Processes share them. What cannot be written, or opened, is tried again with the next values.
    """

    def __init__(self, folder: Path, half_bytes: int) -> None:
        self._folder = folder
        self._half_bytes = half_bytes
        self._environments: list[lmdb.Environment] = []
        self._opened: int | None = None  # which file the newer one is
        self._due: Callable[[], None] | None = None  # what is to be done to the folder before it is opened again
        self._warned = False

    def get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that are here, whole."""
        found, older = self._tried(lambda: self._read(keys)) or ({}, {})
        if older:
            self.put(older)
        return found | older

    def put(self, values: dict[bytes, bytes]) -> None:
        """Keep the values if possible; too many at once are not kept."""
        if sum(map(len, values.values())) <= self._half_bytes // 2:
            self._tried(lambda: self._write(values))

    def _read(self, keys: Sequence[bytes]) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        """What the newer environment has, and what only the older one has."""
        found: dict[bytes, bytes] = {}
        older: dict[bytes, bytes] = {}
        for environment, values in zip(self._environments, (found, older), strict=True):
            with environment.begin() as transaction:
                read = ((key, transaction.get(key)) for key in keys if key not in found)
                values.update((key, value[:-_CHECKSUM_BYTES]) for key, value in read if value and _is_whole(value))
        return found, older

    def _write(self, values: dict[bytes, bytes]) -> None:
        with self._environments[0].begin(write=True) as transaction:
            for key, value in values.items():
                transaction.put(key, value + _checksum(value))
        self._warned = False

    def _tried(self, do: Callable[[], T]) -> T | None:
        """What `do` returns, tried again where what was in its way can be mended; None if it cannot be done now."""
        reason = ""
        for _ in range(_TRIES):
            try:
                # Another process may have rotated; what it keeps since is in none of those that are open here.
                if not self._environments or self._newer() != self._opened:
                    self._open()
                return do()
            except (lmdb.Error, OSError) as error:
                reason = str(error)
                if not self._mend(error):
                    break
        if not self._warned:
            log.warning("prefix_cache.not_kept", extra={"folder": str(self._folder), "reason": reason})
            self._warned = True
        return None

    def _mend(self, error: Exception) -> bool:
        """Whether it is worth another try, with the folder opened anew."""
        if isinstance(error, lmdb.MapFullError):
            self._due = self._rotate
        elif isinstance(error, _DAMAGED):
            log.warning("prefix_cache.damaged", extra={"folder": str(self._folder), "reason": str(error)})
            self._due = self._remove
        elif not isinstance(error, _MAPPED_ANEW):
            return False
        self._close()
        return True

    def _open(self) -> None:
        self._close()
        with self._locked():
            # If the newer one is another by now, another process has done what is due.
            if self._due and self._newer() == self._opened:
                self._due()
            self._due = None
            self._opened = self._newer()
            try:
                for name in _NAMES:
                    self._environments.append(self._open_one(name))
            except (lmdb.Error, OSError):
                self._close()
                raise
            self._opened = self._newer()

    def _open_one(self, name: str) -> lmdb.Environment:
        path = self._folder / name
        path.mkdir(exist_ok=True)
        environment = lmdb.open(str(path), map_size=self._half_bytes)
        expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        # LMDB maps the file as long as it should be; a read behind its real end would kill the process.
        if (found := (path / "data.mdb").stat().st_size) < expected:
            environment.close()
            raise lmdb.CorruptedError(f"{found} bytes instead of {expected}")
        return environment

    def _newer(self) -> int | None:
        """Which file the newer one is on disk, as its inode; one that is open keeps its own, whatever its name."""
        try:
            return (self._folder / "newer" / "data.mdb").stat().st_ino
        except FileNotFoundError:
            return None

    def _rotate(self) -> None:
        shutil.rmtree(self._folder / "older", ignore_errors=True)
        (self._folder / "newer").rename(self._folder / "older")

    def _remove(self) -> None:
        for name in _NAMES:
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _close(self) -> None:
        for environment in self._environments:
            environment.close()
        self._environments = []

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from opening and changing the folder meanwhile."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _checksum(value: bytes) -> bytes:
    return zlib.crc32(value).to_bytes(_CHECKSUM_BYTES, "big")


def _is_whole(value: bytes) -> bool:
    return value[-_CHECKSUM_BYTES:] == _checksum(value[:-_CHECKSUM_BYTES])
