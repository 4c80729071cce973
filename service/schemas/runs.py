"""Training runs."""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from service.schemas.base import Schema, Timestamp
from service.schemas.edits import EditError


class RunStatus(StrEnum):
    """Where a run is. STALE: a rollback or activation overtook it, so its version was not activated."""

    QUEUED = "queued"
    TRAINING = "training"
    VERIFYING = "verifying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    STALE = "stale"


class Trigger(StrEnum):
    """What starts runs."""

    IMMEDIATE = "immediate"
    BATCH = "batch"
    INTERVAL = "interval"
    MANUAL = "manual"


class EpochLoss(Schema):
    """One epoch of a run."""

    epoch: int
    loss: float
    steps: int
    seconds: float


class Run(Schema):
    """One breadth-first training pass over the cumulative set."""

    object: Literal["run"] = "run"
    id: str
    status: RunStatus
    trigger: Trigger
    token: int | None = Field(description="Fencing token; only the newest may commit")
    parent: int | None = Field(description="The version that was active when it began")
    epoch_of_activation: int | None
    version: int | None
    edits: int
    new_edits: int
    phase: str
    epochs: list[EpochLoss]
    eta_s: float | None
    timings: dict[str, float] = Field(description="Seconds by phase")
    error: EditError | None
    created_at: Timestamp
    started_at: Timestamp | None
    verifying_since: Timestamp | None = None
    finished_at: Timestamp | None
