"""Values by key in a folder of bounded size, memory-mapped (LMDB). A disk that is full or a file that is damaged loses
values, never more.
"""

import logging
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import lmdb

log = logging.getLogger(__name__)

_CHECKSUM_BYTES = 4


class Generations:
    """Two LMDB environments: what is used moves to the newer one; when that is full, the older one is dropped."""

    def __init__(self, folder: Path, half_bytes: int) -> None:
        self._folder = folder
        self._half_bytes = half_bytes
        self._environments: list[lmdb.Environment] = []
        try:
            self._open_both()
        except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError) as error:
            self._start_anew(error)
        except (lmdb.Error, OSError) as error:
            self._give_up(error)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that are here, whole."""
        found: dict[bytes, bytes] = {}
        older: dict[bytes, bytes] = {}
        try:
            for environment, values in zip(self._environments, (found, older), strict=False):
                with environment.begin() as transaction:
                    read = ((key, transaction.get(key)) for key in keys if key not in found)
                    values.update((key, value[:-_CHECKSUM_BYTES]) for key, value in read if value and _is_whole(value))
        except lmdb.Error as error:
            self._start_anew(error)
        if older:
            self.put(older)
        return found | older

    def put(self, values: dict[bytes, bytes]) -> None:
        """Keep the values if possible; too many at once are not kept."""
        if not self._environments or sum(map(len, values.values())) > self._half_bytes // 2:
            return
        try:
            try:
                self._write(values)
            except lmdb.MapFullError:
                self._rotate()
                self._write(values)
        except (lmdb.Error, OSError) as error:
            self._give_up(error)

    def _write(self, values: dict[bytes, bytes]) -> None:
        with self._environments[0].begin(write=True) as transaction:
            for key, value in values.items():
                transaction.put(key, value + _checksum(value))

    def _rotate(self) -> None:
        for environment in self._environments:
            environment.close()
        shutil.rmtree(self._folder / "older", ignore_errors=True)
        (self._folder / "newer").rename(self._folder / "older")
        self._open_both()

    def _open_both(self) -> None:
        self._environments = [self._open("newer"), self._open("older")]

    def _open(self, name: str) -> lmdb.Environment:
        path = self._folder / name
        path.mkdir(parents=True, exist_ok=True)
        environment = lmdb.open(str(path), map_size=self._half_bytes)
        expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        # LMDB maps the file as long as it should be; a read behind its real end would kill the process.
        if (found := (path / "data.mdb").stat().st_size) < expected:
            environment.close()
            raise lmdb.CorruptedError(f"{found} bytes instead of {expected}")
        return environment

    def _start_anew(self, error: Exception) -> None:
        log.warning("prefix_cache.damaged", extra={"folder": str(self._folder), "reason": str(error)})
        for environment in self._environments:
            environment.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._open_both()
        except (lmdb.Error, OSError) as failure:
            self._give_up(failure)

    def _give_up(self, error: Exception) -> None:
        log.warning("prefix_cache.not_kept", extra={"folder": str(self._folder), "reason": str(error)})
        self._environments = []


def _checksum(value: bytes) -> bytes:
    return zlib.crc32(value).to_bytes(_CHECKSUM_BYTES, "big")


def _is_whole(value: bytes) -> bool:
    return value[-_CHECKSUM_BYTES:] == _checksum(value[:-_CHECKSUM_BYTES])
