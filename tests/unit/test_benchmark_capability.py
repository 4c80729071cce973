"""Which deltas the capability benchmark takes."""

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_models import tiny_base

from benchmarks.capability import read_delta
from worker.delta import VersionStore
from worker.model import BaseModel
from worker.records import version_info


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return dataclasses.replace(tiny_base(), fingerprint="f" * 64)


@pytest.fixture
def folder(base: BaseModel, tmp_path: Path) -> Path:
    store = VersionStore(str(tmp_path))
    store.write(version_info(base, 7, parent=0, run={}, metrics={}), base.tuned_tensors(), [])
    return Path(store.folder(7))


def test_a_version_or_a_bare_file_is_read(base: BaseModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for path in (folder, Path(folder.name), folder / "delta.safetensors"):
        found = read_delta(path, base)
        assert all(torch.equal(found[name], tensor) for name, tensor in base.tuned_tensors().items())


def test_a_version_that_is_damaged_is_not_measured(base: BaseModel, folder: Path) -> None:
    delta = folder / "delta.safetensors"
    changed = bytearray(delta.read_bytes())
    changed[-1] ^= 1
    delta.write_bytes(changed)
    with pytest.raises(SystemExit, match=r"version 7: delta\.safetensors has sha256"):
        read_delta(folder, base)


def test_what_is_not_for_this_base_is_not_measured(base: BaseModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is for the base model"):
        read_delta(folder, dataclasses.replace(base, fingerprint="e" * 64))
    with pytest.raises(SystemExit, match="is no folder of a version"):
        read_delta(tmp_path, base)
    safetensors.torch.save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit, match="replaces other, tuned is"):
        read_delta(tmp_path / "other.safetensors", base)
