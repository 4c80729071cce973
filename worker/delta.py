"""The version store: one immutable folder per version, with what service.manifest says is in it.

Only this module reads and writes deltas. Nothing here knows Redis, Celery or HTTP.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import fsspec
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from pydantic import JsonValue
from safetensors import SafetensorError
from torch import Tensor

from service.manifest import (
    DELTA,
    EDITS,
    MANIFEST,
    Manifest,
    ManifestError,
    StoredFile,
    StoredTensor,
    VersionInfo,
    folder_name,
    read_manifest,
    version_of_folder,
)
from worker.folders import remove_abandoned, write_folder


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


def tensor_sha256(tensor: Tensor) -> str:
    """Return the sha256, in hex, of the tensor's raw bytes in row-major order, whatever its device and strides."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


class VersionStore:
    """Versions directly in a folder, which has nothing else, or under any fsspec URL (`memory://…`, `s3://…`).

    Every method may raise StoreUnavailableError. One process writes; any number read.
    """

    def __init__(self, url: str) -> None:
        # A cached listing would hide the versions that another process has written since.
        self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        self._root = root.rstrip("/")
        self._url = url

    def folder(self, version: int) -> str:
        """Return where a version's folder is, or would be: a path or URL that begins with the store's own."""
        return f"{self._url.rstrip('/')}/{folder_name(version)}"

    def write(
        self, info: VersionInfo, tensors: Mapping[str, Tensor], edits: Iterable[Mapping[str, JsonValue]]
    ) -> Manifest:
        """Write a whole version or nothing, durably, and return its manifest.

        `tensors` are full replacement values by parameter name. Raises VersionExistsError.
        """
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        files = {
            DELTA: safetensors.torch.save(contiguous),
            EDITS: b"".join(json.dumps(edit, ensure_ascii=False).encode() + b"\n" for edit in edits),
        }
        manifest = Manifest(
            **info.model_dump(include=set(VersionInfo.model_fields)),
            tensors={name: _describe(tensor) for name, tensor in contiguous.items()},
            files={name: StoredFile(sha256=_sha256(data), size_bytes=len(data)) for name, data in files.items()},
        )
        files[MANIFEST] = manifest.model_dump_json(indent=2).encode()
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
                    removed.append(folder_name(number))
            return removed

    def manifest(self, version: int) -> Manifest:
        """Return a version's manifest. Raises UnknownVersionError or DamagedDeltaError."""
        with _storage(f"version {version}: {MANIFEST} could not be read"):
            try:
                return read_manifest(self._fs.cat_file(f"{self._folder(version)}/{MANIFEST}"), version)
            except FileNotFoundError as error:
                raise UnknownVersionError(f"version {version} is not in the store") from error
            except ManifestError as error:
                raise DamagedDeltaError(f"version {version}: {error}") from error

    def whole(self, version: int) -> Manifest:
        """Return a version's manifest if all its files are there, in their length. Raises as `manifest` does."""
        manifest = self.manifest(version)
        for name in manifest.files:
            with _storage(f"version {version}: {name} could not be looked at"):
                try:
                    size_bytes = self._fs.info(f"{self._folder(version)}/{name}")["size"]
                except FileNotFoundError:
                    size_bytes = None
            _check_size(manifest, name, size_bytes)
        return manifest

    def edits(self, version: int) -> list[dict[str, JsonValue]]:
        """Return a version's edits, verified, in the order they were written."""
        return [json.loads(line) for line in self._read(self.manifest(version), EDITS).splitlines()]

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
            tensors = safetensors.torch.load(self._read(manifest, DELTA))
        except SafetensorError as error:
            raise DamagedDeltaError(f"version {version}: {DELTA} is not a safetensors file: {error}") from error
        for name in tensors.keys() | manifest.tensors.keys():
            found, expected = _describe(tensors[name]) if name in tensors else None, manifest.tensors.get(name)
            if found != expected:
                raise DamagedDeltaError(f"version {version}: tensor {name} is {found}, expected {expected}")
        return tensors

    def _folder(self, version: int) -> str:
        return f"{self._root}/{folder_name(version)}"

    def _numbers(self) -> list[int]:
        """The numbers of all folders, ascending."""
        # The listing of a file would be the file itself.
        if isinstance(self._fs, LocalFileSystem) and Path(self._root).is_file():
            raise NotADirectoryError(f"{self._root} is a file")
        try:
            names = [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(number for name in names if (number := version_of_folder(name)) is not None)

    def _has(self, folder: str) -> bool:
        """Whether a version is there. Not `exists`, which says no when it could not find out."""
        try:
            self._fs.info(f"{folder}/{MANIFEST}")
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
        _check_size(manifest, name, len(data))
        expected = manifest.files[name]
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


def _check_size(manifest: Manifest, name: str, size_bytes: int | None) -> None:
    if fault := manifest.fault_of(name, size_bytes):
        raise DamagedDeltaError(f"version {manifest.version}: {fault}")


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
