"""Versions: what is known of them, and the pointer to the active one."""

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from service.schemas.base import Schema, Timestamp
from service.schemas.edits import Edit, Format


class VersionState(StrEnum):
    """What is known of a committed version. MISSING: its folder is gone from the version store."""

    COMMITTED = "committed"
    VERIFIED = "verified"
    REJECTED = "rejected"
    MISSING = "missing"


class EditCounts(Schema):
    """Sizes of a version's edit set, against its parent's."""

    count: int
    added: int
    removed: int


class VersionRecord(Schema):
    """What the registry stores of a version; the delta itself is in the version store."""

    version: int
    parent: int | None
    run: str | None
    state: VersionState
    fingerprint: str = Field(description="Checkpoint fingerprint of the base model, SHA-256")
    location: str
    tensors: dict[str, str] = Field(description="SHA-256 of each tuned tensor")
    formats: list[Format] = Field(description="The formats that its edits were trained in")
    training: dict[str, Any] = Field(default={}, description="Seed, configuration, epochs and libraries of its run")
    metrics: dict[str, Any]
    edits: EditCounts
    reason: str | None = Field(default=None, description="Why it is in this state")
    created_at: Timestamp


class Outcomes(Schema):
    """How requests to `errata` ended; what a client did wrong or broke off is in neither number."""

    ok: int = 0
    errors: int = Field(default=0, description="No node answered, or one broke off or refused the version")


class Canary(Schema):
    """A verified version that answers a part of the requests to `errata` before it is active."""

    version: int
    since: Timestamp
    of_canary: Outcomes = Field(description="Requests that it answered")
    of_active: Outcomes = Field(description="Requests that the active version answered meanwhile")


class Version(VersionRecord):
    """A version as the API shows it."""

    object: Literal["version"] = "version"
    active: bool
    canary: Canary | None = Field(default=None, description="What is known of it as a canary, while it is one")
    resident: list[str] = Field(default=[], description="Addresses of the nodes that hold it; only for one version")


class ActivateRequest(Schema):
    """Optional condition of an activation."""

    expected_active: int | None = Field(default=None, ge=0, strict=True)


class RollbackRequest(Schema):
    """Where to roll back to; without it, the previously active version."""

    to: int | None = Field(default=None, ge=0, strict=True)


class Activation(Schema):
    """The pointer after a move."""

    object: Literal["activation"] = "activation"
    active: int
    previous: int | None
    epoch: int = Field(description="Counts the pointer's moves; a run that began in another epoch is not activated")
    canary: int | None = Field(default=None, description="The version that a part of the requests to `errata` gets")


class VersionDiff(Schema):
    """Edits that are in one version and not in the other."""

    object: Literal["diff"] = "diff"
    only_in: dict[str, list[Edit]] = Field(description="By version number")
