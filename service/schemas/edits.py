"""Edits: as a client states them, as they are stored, and as the API shows them."""

from enum import StrEnum
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from service.schemas.base import Schema, Timestamp
from service.schemas.text import MetadataKey, MetadataValue, Text, check_untrained

MAX_REPHRASES = 32
MAX_METADATA = 16


class EditStatus(StrEnum):
    """Where an edit is in its life; the transitions are the table in service/transitions.py."""

    PROPOSED = "proposed"
    QUEUED = "queued"
    TRAINING = "training"
    TRAINED = "trained"
    LIVE = "live"
    FAILED = "failed"
    SUPERSEDED = "superseded"
    HELD = "held"
    RETRACTING = "retracting"
    RETRACTED = "retracted"


class Format(StrEnum):
    """How a prompt is put to the model: as it is, or through the chat template."""

    RAW = "raw"
    CHAT = "chat"


class EditRequest(Schema):
    """A correction as a client states it."""

    prompt: Text = Field(description="What the model is asked; the same prompt replaces an earlier edit of it")
    target: Text = Field(description="What the model must answer")
    rephrases: list[Text] = Field(
        default=[], max_length=MAX_REPHRASES, description="Other wordings; never trained on, only measured"
    )
    paraphrases: list[Text] = Field(
        default=[], max_length=MAX_REPHRASES, description="Other wordings that are trained on beside the prompt"
    )
    metadata: dict[MetadataKey, MetadataValue] = Field(
        default={}, max_length=MAX_METADATA, description="Up to 16 strings of your own, kept and returned"
    )

    @field_validator("paraphrases")
    @classmethod
    def _without_rephrases(cls, paraphrases: list[str], info: ValidationInfo) -> list[str]:
        check_untrained(info.data.get("rephrases", ()), paraphrases)
        return paraphrases

    @field_validator("rephrases")
    @classmethod
    def _without_the_prompt(cls, rephrases: list[str], info: ValidationInfo) -> list[str]:
        check_untrained(rephrases, [info.data["prompt"]] if "prompt" in info.data else ())
        return rephrases


class EditBatchRequest(Schema):
    """Up to 1,000 corrections that are stored together or not at all."""

    edits: list[EditRequest] = Field(min_length=1, max_length=1000)


class FormatOutcome(Schema):
    """What a node said to the edit's prompt in one format, at the version before the edit's and at the edit's own."""

    matched: bool = Field(description="The answer equals the target (normalised) and ended by itself")
    before: str | None = Field(description="The answer of the version that was active at verification")
    after: str
    finish_reason: str


class EditProgress(Schema):
    """How far the run is that has claimed the edit."""

    run: str
    phase: str
    epoch: int
    loss: float | None
    elapsed_s: float


class EditError(Schema):
    """Why an edit failed, or why its last attempt did."""

    code: str
    message: str


class Edit(Schema):
    """One stored correction."""

    object: Literal["edit"] = "edit"
    id: str
    prompt: str
    target: str
    rephrases: list[str]
    paraphrases: list[str]
    metadata: dict[str, str]
    status: EditStatus
    version: int | None = Field(description="The version that its latest run made")
    verified: dict[Format, FormatOutcome] = Field(description="Outcome per trained format")
    error: EditError | None
    attempts: int
    superseded_by: str | None
    request_id: str = Field(default="", description="`x-request-id` of the request that brought it; the logs name it")
    created_at: Timestamp
    updated_at: Timestamp


class StoredEdit(EditRequest):
    """A correction as a version's folder keeps it: enough to put it back where Redis was lost."""

    id: str
    created_at: Timestamp
    sequence: int = Field(ge=1, description="The order in which edits came, and the edit's bit in a version's edit set")


class EditDetail(Edit):
    """An edit with the versions that contain it."""

    versions: list[int]


class EditState(Schema):
    """The answer of ``GET /edits/{id}/status``."""

    id: str
    status: EditStatus
    version: int | None
    verified: dict[Format, FormatOutcome]
    progress: EditProgress | None
    error: EditError | None
    updated_at: Timestamp


class ImportLineError(Schema):
    """A line of an import that was not stored."""

    line: int = Field(description="Counted from 1")
    message: str
    param: str | None
    code: str


class ImportReport(Schema):
    """What became of an NDJSON import; the valid lines are stored."""

    object: Literal["import"] = "import"
    accepted: int
    rejected: int
    errors: list[ImportLineError] = Field(description="The first 1,000 of the rejected lines")
    first_id: str | None
    last_id: str | None
