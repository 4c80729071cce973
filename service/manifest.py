"""What is in a version's folder: its files, and the manifest that says what the version is and what they must be.

    000007/delta.safetensors   full replacement tensors by parameter name, bfloat16 as a rule
    000007/edits.jsonl         the version's edits, one JSON object a line
    000007/manifest.json       what the version is, and the checksum of everything above; written last

A version is there when its manifest is there. Nothing here reads or writes files: `worker.delta` does.
"""

import hashlib
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError

DELTA = "delta.safetensors"
EDITS = "edits.jsonl"
MANIFEST = "manifest.json"

Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class ManifestError(ValueError):
    """A manifest that is not the version's, or none at all; the message, one line, begins with the file's name."""


def folder_name(version: int) -> str:
    """The name of a version's folder."""
    return f"{version:06d}"


def version_of_folder(folder: str) -> int | None:
    """The version whose folder has this name; None if it is no version's."""
    return int(folder) if re.fullmatch("[0-9]{6,}", folder) else None


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(_Record):
    """The base model of a version."""

    name: str
    fingerprint: Sha256


class StoredTensor(_Record):
    """One replacement tensor: `dtype` as torch names it (`bfloat16`), `sha256` of its bytes in row-major order."""

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

    def fault_of(self, file: str, size_bytes: int | None) -> str | None:
        """What is wrong with one of `files` by its size, None where it is not there; None if nothing is."""
        expected = self.files[file].size_bytes
        if size_bytes is None:
            return f"{file} is missing"
        return None if size_bytes == expected else f"{file} has {size_bytes} bytes, expected {expected}"


def read_manifest(text: bytes, version: int) -> Manifest:
    """Return the manifest that a version's MANIFEST holds. Raises ManifestError."""
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"{place}: {first['msg']}" if place else first["msg"]
        raise ManifestError(f"{MANIFEST} cannot be read: {reason}") from error
    if manifest.version != version:
        raise ManifestError(f"{MANIFEST} is of version {manifest.version}")
    if manifest.files.keys() != {DELTA, EDITS}:
        raise ManifestError(f"{MANIFEST} lists the files {sorted(manifest.files)}")
    return manifest
