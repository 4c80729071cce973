"""What is of no one subject: pages, events, the audit log, health and errors."""

from typing import Any, Generic, Literal, TypeVar

from service.schemas.base import Schema

T = TypeVar("T")


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
