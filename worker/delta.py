"""Versions on disk: the delta's file format and the store that keeps one immutable folder per version.

    versions/000007/delta.safetensors   full replacement tensors by parameter name, bfloat16 as a rule
    versions/000007/edits.jsonl         the version's edits, one JSON object a line
    versions/000007/manifest.json       what the version is, and the checksum of everything above; written last

A version is there when its manifest is there. Nothing here knows Redis, Celery, HTTP or the service's types.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import fsspec
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from worker.folders import remove_abandoned, write_folder

_DELTA = "delta.safetensors"
_EDITS = "edits.jsonl"
_MANIFEST = "manifest.json"

Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class DeltaError(Exception):
    """A version that cannot be stored or served as asked."""


class UnknownVersionError(DeltaError):
    """The store has no such version."""


class DamagedDeltaError(DeltaError):
    """A version's files are not what its manifest says."""


class WrongBaseError(DeltaError):
    """The version was trained from another base model."""


class WrongShapeError(DeltaError):
    """The version replaces other tensors, or tensors of another shape, than the model has."""


class VersionExistsError(DeltaError):
    """The version was already written; versions are immutable."""


class StoreUnavailableError(DeltaError):
    """The store's storage failed: a full disk, a refused permission, a lost connection."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(_Record):
    """The base model of a version."""

    name: str
    fingerprint: Sha256


class StoredTensor(_Record):
    """One replacement tensor: `dtype` as torch names it (`bfloat16`), `sha256` as `tensor_sha256` gives it."""

    shape: tuple[int, ...]
    dtype: str
    sha256: Sha256


class StoredFile(_Record):
    """One file of a version's folder."""

    sha256: Sha256
    size_bytes: int


class VersionInfo(_Record):
    """What the writer of a version says about it; the store adds what it measures (see Manifest)."""

    version: int = Field(ge=0)
    parent: int | None
    base: Base
    location: str
    run: dict[str, JsonValue]
    metrics: dict[str, JsonValue]
    created_at: int


class Manifest(VersionInfo):
    """What a version is: its origin, the run that made it, and the checksums of its tensors and files."""

    format: Literal[1] = 1
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]

    @property
    def checksum(self) -> str:
        """The sha256, in hex, of the manifest itself: two versions with one checksum are the same version."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """Return the sha256, in hex, of the tensor's raw bytes in row-major order, whatever its device and strides."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


class VersionStore:
    """Versions under a folder or any fsspec URL (`memory://…`, `s3://…`).

    Every method may raise StoreUnavailableError. One process writes; any number read.
    """

    def __init__(self, url: str) -> None:
        # A cached listing would hide the versions that another process has written since.
        self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self._root = f"{root.rstrip('/')}/versions"

    def write(
        self, info: VersionInfo, tensors: Mapping[str, Tensor], edits: Iterable[Mapping[str, JsonValue]]
    ) -> Manifest:
        """Write a whole version or nothing, durably, and return its manifest.

        `tensors` are full replacement values by parameter name. Raises VersionExistsError.
        """
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        files = {
            _DELTA: safetensors.torch.save(contiguous),
            _EDITS: b"".join(json.dumps(edit, ensure_ascii=False).encode() + b"\n" for edit in edits),
        }
        manifest = Manifest(
            **info.model_dump(include=set(VersionInfo.model_fields)),
            tensors={name: _describe(tensor) for name, tensor in contiguous.items()},
            files={name: StoredFile(sha256=_sha256(data), size_bytes=len(data)) for name, data in files.items()},
        )
        files[_MANIFEST] = manifest.model_dump_json(indent=2).encode()
        folder = self._folder(info.version)
        with _storage(f"version {info.version} could not be written"):
            if self._has(folder):
                raise VersionExistsError(f"version {info.version} is already written")
            if isinstance(self._fs, LocalFileSystem):
                try:
                    write_folder(Path(folder), files)
                except FileExistsError as error:
                    raise VersionExistsError(str(error)) from error
            else:
                self._upload(folder, files)
        return manifest

    def versions(self) -> list[int]:
        """Return the numbers of the whole versions, ascending."""
        with _storage("versions could not be listed"):
            return [number for number in self._numbers() if self._has(self._folder(number))]

    def last_number(self) -> int:
        """Return the highest number of a folder that is there, whole or not; 0 for none."""
        with _storage("versions could not be listed"):
            return max(self._numbers(), default=0)

    def clean(self, *, uploading: bool = False) -> list[str]:
        """Remove what writers that died left, never a folder with a manifest; return the names of what is gone.

        A folder that is being written is left alone: on a local disk its writer holds a lock on it; elsewhere, where it
        has none, the caller says with `uploading` that there may be one.
        """
        with _storage("the version store could not be cleaned"):
            removed = []
            local = isinstance(self._fs, LocalFileSystem)
            if local and Path(self._root).is_dir():
                removed += remove_abandoned(Path(self._root))
            for number in [] if uploading and not local else self._numbers():
                if not self._has(self._folder(number)):
                    self._fs.rm(self._folder(number), recursive=True)
                    removed.append(f"{number:06d}")
            return removed

    def manifest(self, version: int) -> Manifest:
        """Return a version's manifest. Raises UnknownVersionError or DamagedDeltaError."""
        with _storage(f"version {version}: {_MANIFEST} could not be read"):
            try:
                manifest = Manifest.model_validate_json(self._fs.cat_file(f"{self._folder(version)}/{_MANIFEST}"))
            except FileNotFoundError as error:
                raise UnknownVersionError(f"version {version} is not in the store") from error
            except ValidationError as error:
                raise DamagedDeltaError(f"version {version}: {_MANIFEST} cannot be read: {error}") from error
        if manifest.version != version:
            raise DamagedDeltaError(f"version {version}: {_MANIFEST} is of version {manifest.version}")
        if manifest.files.keys() != {_DELTA, _EDITS}:
            raise DamagedDeltaError(f"version {version}: {_MANIFEST} lists the files {sorted(manifest.files)}")
        return manifest

    def whole(self, version: int) -> Manifest:
        """Return a version's manifest if all its files are there, in their length. Raises as `manifest` does."""
        manifest = self.manifest(version)
        for name, expected in manifest.files.items():
            with _storage(f"version {version}: {name} could not be looked at"):
                try:
                    size_bytes = self._fs.info(f"{self._folder(version)}/{name}")["size"]
                except FileNotFoundError as error:
                    raise DamagedDeltaError(f"version {version}: {name} is missing") from error
            _check_size(version, name, size_bytes, expected)
        return manifest

    def edits(self, version: int) -> list[dict[str, JsonValue]]:
        """Return a version's edits, verified, in the order they were written."""
        return [json.loads(line) for line in self._read(self.manifest(version), _EDITS).splitlines()]

    def load(
        self, version: int, *, fingerprint: str | None = None, shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> dict[str, Tensor]:
        """Return a version's replacement tensors by parameter name, verified, on the CPU.

        `fingerprint` is that of the base model they are for, `shapes` those of the parameters to be replaced: exactly
        these, and no others. Raises UnknownVersionError, WrongBaseError, WrongShapeError or DamagedDeltaError.
        """
        manifest = self.manifest(version)
        if fingerprint is not None and manifest.base.fingerprint != fingerprint:
            raise WrongBaseError(
                f"version {version} is for the base model {manifest.base.fingerprint} ({manifest.base.name}), "
                f"not for {fingerprint}"
            )
        if shapes is not None:
            _check_shapes(manifest, shapes)
        try:
            tensors = safetensors.torch.load(self._read(manifest, _DELTA))
        except SafetensorError as error:
            raise DamagedDeltaError(f"version {version}: {_DELTA} is not a safetensors file: {error}") from error
        for name in tensors.keys() | manifest.tensors.keys():
            found, expected = _describe(tensors[name]) if name in tensors else None, manifest.tensors.get(name)
            if found != expected:
                raise DamagedDeltaError(f"version {version}: tensor {name} is {found}, expected {expected}")
        return tensors

    def _folder(self, version: int) -> str:
        return f"{self._root}/{version:06d}"

    def _numbers(self) -> list[int]:
        """The numbers of all folders, ascending."""
        try:
            names = [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if re.fullmatch(r"\d{6,}", name))

    def _has(self, folder: str) -> bool:
        """Whether a version is there. Not `exists`, which says no when it could not find out."""
        try:
            self._fs.info(f"{folder}/{_MANIFEST}")
        except FileNotFoundError:
            return False
        return True

    def _read(self, manifest: Manifest, name: str) -> bytes:
        """Return a file's content after checking it against the manifest."""
        with _storage(f"version {manifest.version}: {name} could not be read"):
            try:
                data: bytes = self._fs.cat_file(f"{self._folder(manifest.version)}/{name}")
            except FileNotFoundError as error:
                raise DamagedDeltaError(f"version {manifest.version}: {name} is missing") from error
        expected = manifest.files[name]
        _check_size(manifest.version, name, len(data), expected)
        if _sha256(data) != expected.sha256:
            raise DamagedDeltaError(
                f"version {manifest.version}: {name} has sha256 {_sha256(data)}, expected {expected.sha256}"
            )
        return data

    def _upload(self, folder: str, files: Mapping[str, bytes]) -> None:
        """Upload in order, so that the manifest is last; take back what was uploaded if one upload fails."""
        started: list[str] = []
        try:
            for name, data in files.items():
                started.append(f"{folder}/{name}")
                self._fs.pipe_file(started[-1], data)
        except BaseException:
            for path in started:
                with contextlib.suppress(Exception):
                    self._fs.rm_file(path)
            raise


@contextlib.contextmanager
def _storage(what: str) -> Iterator[None]:
    """Says what failed when the storage does. What drivers raise has no class in common: botocore's are no OSErrors."""
    try:
        yield
    except (DeltaError, MemoryError):
        raise
    except Exception as error:
        raise StoreUnavailableError(f"{what}: {str(error) or repr(error)}") from error


def _check_size(version: int, name: str, size_bytes: int, expected: StoredFile) -> None:
    if size_bytes != expected.size_bytes:
        raise DamagedDeltaError(f"version {version}: {name} has {size_bytes} bytes, expected {expected.size_bytes}")


def _describe(tensor: Tensor) -> StoredTensor:
    return StoredTensor(
        shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."), sha256=tensor_sha256(tensor)
    )


def _check_shapes(manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(manifest.tensors.keys() | shapes.keys()):
        found = manifest.tensors[name].shape if name in manifest.tensors else None
        if found != shapes.get(name):
            raise WrongShapeError(
                f"version {manifest.version}: tensor {name} has shape {found}, the model's is {shapes.get(name)}"
            )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
