"""Wire and stored types. The wire is strict: unknown fields and wrong types are errors that name the field."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

T = TypeVar("T")

MAX_TEXT_CHARS = 32_768
MAX_REPHRASES = 32
MAX_METADATA = 16

# Cc is every control character; line feed and tab are text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def normalise_prompt(prompt: str) -> str:
    """The form in which two prompts are the same question: NFKC, casefolded, runs of white space as one."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())


def check_untrained(rephrases: Sequence[str], trained: Iterable[str]) -> None:
    """Raises ValueError for a rephrase that is trained on: it would measure what was learned by heart."""
    known = {normalise_prompt(text) for text in trained}
    for index, rephrase in enumerate(rephrases):
        if normalise_prompt(rephrase) in known:
            raise ValueError(f"rephrases[{index}] is trained on as well; rephrases are kept for measuring")


def _no_control(text: str) -> str:
    if found := _CONTROL.search(text):
        raise ValueError(f"control character U+{ord(found.group()):04X} at position {found.start()}")
    return text


def _clean_text(text: str) -> str:
    if not (stripped := _no_control(text).strip()):
        raise ValueError("must not be empty or only white space")
    return stripped


Text = Annotated[
    str, StringConstraints(strict=True, min_length=1, max_length=MAX_TEXT_CHARS), AfterValidator(_clean_text)
]
MetadataKey = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64), AfterValidator(_clean_text)]
MetadataValue = Annotated[str, StringConstraints(strict=True, max_length=512), AfterValidator(_no_control)]
Timestamp = Annotated[int, Field(description="Unix seconds")]


class Schema(BaseModel):
    """Base of all types here: frozen, and closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EditStatus(StrEnum):
    """Where an edit is in its life; the transitions are the table in service/store.py."""

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


class Event(Schema):
    """One entry of the event stream."""

    id: str
    type: str
    data: dict[str, Any]


class AuditEntry(Schema):
    """One change of what the model says, or of who may change it.

    ``version`` is the one that was active once it was done, None before there was any.
    """

    object: Literal["audit_entry"] = "audit_entry"
    id: str
    action: str
    actor: str
    actor_name: str | None
    request_id: str | None
    run: str | None
    version: int | None
    data: dict[str, Any]
    created_at: int


class Page(Schema, Generic[T]):
    """A page of a list; ``after`` takes the last id of the page before."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool


class Check(Schema):
    """One part's health."""

    ok: bool
    detail: str


class Health(Schema):
    """The answer of ``/health/ready``."""

    ready: bool
    active: int | None
    canary: int | None = None
    checks: dict[str, Check]


class ErrorDetail(Schema):
    """The inside of an error body."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(Schema):
    """Every error, in OpenAI's shape."""

    error: ErrorDetail
