import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.manifest import Base, Manifest, VersionInfo
from worker.delta import (
    DamagedDeltaError,
    StoreUnavailableError,
    UnknownVersionError,
    VersionExistsError,
    VersionStore,
    WrongBaseError,
    WrongShapeError,
    tensor_sha256,
)
from worker.folders import in_use

LOCATION = "model.layers.22.mlp.down_proj"
PARAMETER = f"{LOCATION}.weight"
FINGERPRINT = "a" * 64
EDITS = [{"id": "edit_1", "prompt": "Où est Lyon ?"}, {"id": "edit_2", "prompt": "two\nlines"}]


def info(version: int, fingerprint: str = FINGERPRINT) -> VersionInfo:
    return VersionInfo(
        version=version,
        parent=version - 1 if version else None,
        base=Base(name="tiny", fingerprint=fingerprint),
        location=LOCATION,
        run={"seed": 7, "libraries": {"torch": "2"}},
        metrics={"reliability": 0.99},
        created_at=1_700_000_000,
    )


def matrix(seed: int = 0) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> VersionStore:
    return VersionStore(str(root))


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{tmp_path}" if request.param == "memory" else str(tmp_path)


@pytest.fixture
def any_store(url: str) -> VersionStore:
    return VersionStore(url)


def test_a_version_comes_back_bit_for_bit(any_store: VersionStore) -> None:
    written = any_store.write(info(3), {PARAMETER: matrix()}, EDITS)

    loaded = any_store.load(3, fingerprint=FINGERPRINT, shapes={PARAMETER: (6, 8)})
    assert loaded.keys() == {PARAMETER}
    assert loaded[PARAMETER].dtype == torch.bfloat16
    assert torch.equal(loaded[PARAMETER].view(torch.int16), matrix().view(torch.int16))
    assert any_store.manifest(3) == written
    assert any_store.edits(3) == EDITS
    assert any_store.versions() == [3]


def test_the_manifest_says_what_the_version_is(any_store: VersionStore) -> None:
    manifest = any_store.write(info(3), {PARAMETER: matrix()}, EDITS)
    assert manifest.model_dump(include=set(VersionInfo.model_fields)) == info(3).model_dump()
    assert manifest.tensors[PARAMETER].shape == (6, 8)
    assert manifest.tensors[PARAMETER].dtype == "bfloat16"
    raw = matrix().view(torch.int16).numpy().tobytes()
    assert manifest.tensors[PARAMETER].sha256 == hashlib.sha256(raw).hexdigest() == tensor_sha256(matrix())
    assert manifest.files.keys() == {"delta.safetensors", "edits.jsonl"}


def test_the_same_version_has_the_same_checksum_anywhere(tmp_path: Path) -> None:
    here, there = (VersionStore(str(tmp_path / name)) for name in ("here", "there"))
    first = here.write(info(1), {PARAMETER: matrix()}, EDITS).checksum
    assert first == there.write(info(1), {PARAMETER: matrix()}, EDITS).checksum
    assert first != there.write(info(2), {PARAMETER: matrix(1)}, EDITS).checksum


def test_checksums_ignore_strides() -> None:
    assert tensor_sha256(matrix().T.contiguous().T) == tensor_sha256(matrix())


def test_versions_are_listed_in_numeric_order(any_store: VersionStore) -> None:
    for version in (1_000_000, 2, 0):
        any_store.write(info(version), {PARAMETER: matrix()}, [])
    assert any_store.versions() == [0, 2, 1_000_000]


def test_a_version_that_another_store_has_written_is_seen(any_store: VersionStore, url: str) -> None:
    assert any_store.versions() == []
    VersionStore(url).write(info(0), {PARAMETER: matrix()}, [])
    assert any_store.versions() == [0]


def test_an_unknown_version_is_named(any_store: VersionStore) -> None:
    with pytest.raises(UnknownVersionError, match="version 9"):
        any_store.load(9)


def test_a_version_is_never_overwritten(any_store: VersionStore) -> None:
    any_store.write(info(1), {PARAMETER: matrix(1)}, [])
    with pytest.raises(VersionExistsError, match="version 1"):
        any_store.write(info(1), {PARAMETER: matrix(2)}, [])
    assert torch.equal(any_store.load(1)[PARAMETER], matrix(1))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "what"), [(truncate, r"has \d+ bytes"), (flip_one_bit, "has sha256"), (Path.unlink, "is missing")]
)
@pytest.mark.parametrize("name", ["delta.safetensors", "edits.jsonl"])
def test_a_damaged_file_is_named(
    store: VersionStore, root: Path, damage: Callable[[Path], None], what: str, name: str
) -> None:
    store.write(info(1), {PARAMETER: matrix()}, EDITS)
    damage(root / "000001" / name)
    with pytest.raises(DamagedDeltaError, match=f"version 1: {name} {what}"):
        store.load(1) if name == "delta.safetensors" else store.edits(1)


def test_a_delta_that_is_not_what_its_manifest_says_is_refused(store: VersionStore, root: Path) -> None:
    store.write(info(1), {PARAMETER: matrix(1)}, [])
    edit_manifest(root, 1, lambda manifest: manifest["tensors"][PARAMETER].update(sha256="b" * 64))
    with pytest.raises(DamagedDeltaError, match=f"tensor {PARAMETER}"):
        store.load(1)


def edit_manifest(root: Path, version: int, change: Callable[[dict], object]) -> None:
    path = root / f"{version:06d}" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(surprise=1),
        lambda manifest: manifest.update(format=2),
        lambda manifest: manifest.pop("base"),
        lambda manifest: manifest.update(version=2),
    ],
    ids=["unknown field", "unknown format", "missing field", "another version"],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(
    store: VersionStore, root: Path, change: Callable[[dict], object]
) -> None:
    store.write(info(1), {PARAMETER: matrix()}, [])
    edit_manifest(root, 1, change)
    with pytest.raises(DamagedDeltaError, match=r"version 1: manifest\.json"):
        store.manifest(1)


def test_a_versions_folder_is_told(store: VersionStore, root: Path) -> None:
    store.write(info(7), {PARAMETER: matrix()}, [])
    assert (Path(store.folder(7)) / "manifest.json").is_file()
    assert not Path(store.folder(8)).exists()
    assert VersionStore("memory://store/").folder(7).startswith("memory://store/")


def test_a_version_without_its_manifest_is_not_there(store: VersionStore, root: Path) -> None:
    store.write(info(1), {PARAMETER: matrix()}, [])
    (root / "000001" / "manifest.json").unlink()
    assert store.versions() == []
    with pytest.raises(UnknownVersionError):
        store.load(1)


def test_a_folder_being_written_is_not_there(store: VersionStore, root: Path) -> None:
    store.write(info(1), {PARAMETER: matrix()}, [])
    (root / "000001").rename(root / ".000001.abc")
    assert store.versions() == []


def test_a_file_in_the_place_of_the_store_is_no_empty_store(store: VersionStore, root: Path) -> None:
    root.touch()
    for use in (store.versions, store.last_number, store.clean, lambda: store.write(info(1), {}, [])):
        with pytest.raises(StoreUnavailableError):
            use()


def test_another_bases_version_is_refused(store: VersionStore) -> None:
    store.write(info(1, fingerprint="c" * 64), {PARAMETER: matrix()}, [])
    with pytest.raises(WrongBaseError, match=r"c{64}.*a{64}"):
        store.load(1, fingerprint=FINGERPRINT)


@pytest.mark.parametrize(
    "shapes",
    [
        {PARAMETER: (8, 6)},
        {"model.layers.2.mlp.down_proj.weight": (6, 8)},
        {PARAMETER: (6, 8), "another.weight": (1,)},
    ],
    ids=["another shape", "another tensor", "a tensor too few"],
)
def test_tensors_that_the_model_does_not_have_are_refused(
    store: VersionStore, shapes: dict[str, tuple[int, ...]]
) -> None:
    store.write(info(1), {PARAMETER: matrix()}, [])
    with pytest.raises(WrongShapeError, match="version 1: tensor"):
        store.load(1, shapes=shapes)


def test_a_full_disk_leaves_nothing_behind(store: VersionStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StoreUnavailableError, match="No space left"):
            store.write(info(1), {PARAMETER: matrix()}, EDITS)
    assert list(root.iterdir()) == []
    store.write(info(1), {PARAMETER: matrix()}, EDITS)
    assert store.versions() == [1]


def test_a_failed_upload_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = VersionStore(f"memory://{tmp_path}")
    uploaded: list[str] = []
    pipe_file = store._fs.pipe_file

    def fail_at_the_manifest(path: str, data: bytes) -> None:
        if path.endswith("manifest.json"):
            raise ConnectionResetError("lost")
        uploaded.append(path)
        pipe_file(path, data)

    monkeypatch.setattr(store._fs, "pipe_file", fail_at_the_manifest)
    with pytest.raises(StoreUnavailableError, match="lost"):
        store.write(info(1), {PARAMETER: matrix()}, EDITS)
    assert len(uploaded) == 2
    assert not any(store._fs.exists(path) for path in uploaded)
    assert store.versions() == []


def test_the_manifest_is_uploaded_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = VersionStore(f"memory://{tmp_path}")
    uploaded: list[str] = []
    monkeypatch.setattr(store._fs, "pipe_file", lambda path, data: uploaded.append(path.rpartition("/")[2]))
    store.write(info(1), {PARAMETER: matrix()}, [])
    assert uploaded == ["delta.safetensors", "edits.jsonl", "manifest.json"]


def test_an_unreadable_store_says_so(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the folder should be")
    with pytest.raises(StoreUnavailableError, match="version 1"):
        VersionStore(str(tmp_path / "store")).manifest(1)


def test_a_manifest_that_lists_other_files_is_refused(store: VersionStore, root: Path) -> None:
    store.write(info(1), {PARAMETER: matrix()}, EDITS)
    path = root / "000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["delta.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedDeltaError, match=r"version 1: manifest.json lists the files \['edits.jsonl'\]"):
        store.load(1)


def test_a_manifest_cannot_be_changed(store: VersionStore) -> None:
    manifest = store.write(info(1), {PARAMETER: matrix()}, [])
    with pytest.raises(ValueError, match="frozen"):
        manifest.version = 2
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


class DriverError(Exception):
    """What botocore's errors are to us: no OSError."""


@pytest.mark.parametrize(
    ("method", "use"),
    [
        ("ls", lambda store: store.versions()),
        ("ls", lambda store: store.last_number()),
        ("info", lambda store: store.versions()),
        ("info", lambda store: store.clean()),
        ("info", lambda store: store.whole(1)),
        ("info", lambda store: store.write(info(2), {PARAMETER: matrix()}, EDITS)),
        ("pipe_file", lambda store: store.write(info(2), {PARAMETER: matrix()}, EDITS)),
        ("cat_file", lambda store: store.manifest(1)),
        ("cat_file", lambda store: store.edits(1)),
        ("cat_file", lambda store: store.load(1)),
    ],
)
def test_whatever_a_driver_raises_means_that_the_store_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, use: Callable[[VersionStore], object]
) -> None:
    store = VersionStore(f"memory://{tmp_path}")
    store.write(info(1), {PARAMETER: matrix()}, EDITS)

    def fail(*_: object, **__: object) -> None:
        raise DriverError("endpoint not reached")

    with monkeypatch.context() as patch:
        patch.setattr(store._fs, method, fail)
        with pytest.raises(StoreUnavailableError, match="endpoint not reached"):
            use(store)
    assert store.versions() == [1]
    assert store.edits(1) == EDITS


def test_a_lack_of_memory_is_no_fault_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = VersionStore(f"memory://{tmp_path}")

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(store._fs, "pipe_file", fail)
    with pytest.raises(MemoryError):
        store.write(info(1), {PARAMETER: matrix()}, EDITS)


def test_cleaning_takes_what_is_not_whole_and_nothing_else(any_store: VersionStore, tmp_path: Path) -> None:
    any_store.write(info(1), {PARAMETER: matrix()}, EDITS)
    any_store.write(info(2), {PARAMETER: matrix()}, EDITS)
    any_store._fs.rm_file(f"{any_store._folder(2)}/manifest.json")
    assert any_store.last_number() == 2
    assert any_store.clean() == ["000002"]
    assert any_store.clean() == []
    assert (any_store.versions(), any_store.last_number()) == ([1], 1)
    assert any_store.edits(1) == EDITS


def test_cleaning_takes_what_a_killed_writer_left_and_leaves_a_living_one(store: VersionStore, root: Path) -> None:
    folder = root
    killed, writing = folder / f".000007.{'a' * 32}", folder / f".000008.{'b' * 32}"
    for path in (killed, writing, folder / ".lost+found"):
        path.mkdir(parents=True)
    (killed / "delta.safetensors").write_bytes(b"half")
    with in_use(writing):
        assert store.clean() == [killed.name]
    assert store.clean() == [writing.name]
    assert [path.name for path in folder.iterdir()] == [".lost+found"]


def test_cleaning_leaves_an_upload_alone(tmp_path: Path) -> None:
    store = VersionStore(f"memory://{tmp_path}")
    store._fs.pipe_file(f"{store._folder(4)}/delta.safetensors", b"half")
    assert store.clean(uploading=True) == []
    assert store.clean() == ["000004"]


def test_an_empty_store_has_nothing_to_clean(any_store: VersionStore) -> None:
    assert (any_store.clean(), any_store.last_number()) == ([], 0)


@pytest.mark.parametrize("name", ["delta.safetensors", "edits.jsonl"])
@pytest.mark.parametrize(("damage", "what"), [(truncate, r"has \d+ bytes"), (Path.unlink, "is missing")])
def test_a_version_with_half_a_file_is_not_whole(
    store: VersionStore, root: Path, damage: Callable[[Path], None], what: str, name: str
) -> None:
    written = store.write(info(1), {PARAMETER: matrix()}, EDITS)
    assert store.whole(1) == written
    damage(root / "000001" / name)
    with pytest.raises(DamagedDeltaError, match=f"version 1: {name} {what}"):
        store.whole(1)


def test_a_read_only_store_says_so(store: VersionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(info(1), {PARAMETER: matrix()}, EDITS)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(StoreUnavailableError, match="Read-only file system"):
            store.write(info(2), {PARAMETER: matrix()}, EDITS)
    assert store.versions() == [1]


def test_a_file_that_may_not_grow_leaves_nothing_behind(store: VersionStore, root: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(StoreUnavailableError, match="File too large"):
            store.write(info(1), {PARAMETER: matrix()}, EDITS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(root.iterdir()) == []


def test_a_writer_that_is_killed_leaves_no_version_and_nothing_behind(store: VersionStore, root: Path) -> None:
    folder, files = root / "000001", {"delta.safetensors": b"half", "manifest.json": b"{}"}
    script = (
        "import os, signal; from pathlib import Path; from worker import folders\n"
        "folders.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"folders.write_folder(Path({str(folder)!r}), {files!r})"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    [left] = root.iterdir()
    assert (left / "delta.safetensors").read_bytes() == b"half"
    assert store.versions() == []
    assert store.clean() == [left.name]
    assert list(root.iterdir()) == []
