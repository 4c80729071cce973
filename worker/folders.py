"""Local files and folders that appear at once and whole; and what a crash leaves of a folder that did not."""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

# A version's folder in the store, or a node's copy of one, which has more behind its number.
_STAGING = re.compile(r"\.\d{6,}(-[0-9a-f]+)*\.[0-9a-f]{32}")


def write_file(path: Path, data: bytes, *, durable: bool) -> None:
    """Make `path` hold `data`, all of it at once; what was there before stays until then, and if it fails.

    The folder is made if there is none. `durable` means that a power cut does not take it back. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process that was killed left its own: in a container the next one has the same number, and writes over it.
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staging.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        staging.rename(path)
    finally:
        staging.unlink(missing_ok=True)
    if durable:
        _fsync_folder(path.parent)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make `folder` with `files` appear at once, durably. Raises OSError; FileExistsError if it is there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    staging.mkdir()
    try:
        with in_use(staging):
            for name, data in files.items():
                with (staging / name).open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            _fsync_folder(staging)
            if folder.exists():
                raise FileExistsError(f"{folder.name} already exists in {folder.parent}")
            # A rename never replaces a folder that has files, so of two writers that come this far one gets an OSError.
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _fsync_folder(folder.parent)


def remove_abandoned(parent: Path) -> list[str]:
    """Remove what writers that died left in `parent`; returns the names. Raises OSError."""
    abandoned = [path for path in sorted(parent.iterdir()) if _STAGING.fullmatch(path.name) and not _is_in_use(path)]
    for path in abandoned:
        shutil.rmtree(path)
    return [path.name for path in abandoned]


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep `remove_abandoned` away. The kernel takes the lock back from a writer that dies, however it does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Some network file systems cannot lock a folder. There a repair may take it from under its writer, who fails.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_in_use(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
