"""The audit log over HTTP."""

from typing import Annotated

from fastapi import APIRouter, Query

from service.api.dependencies import PartsDep
from service.api.errors import RESPONSES
from service.schemas import AuditEntry, Page

router = APIRouter(tags=["audit"], responses=RESPONSES)

# Redis knows no id before 0-0; it gives none that begins with 0.
_ID = r"^[1-9][0-9]{0,18}-[0-9]{1,19}$"


@router.get("/audit")
def list_audit(
    parts: PartsDep,
    after: Annotated[str | None, Query(pattern=_ID, description="The last id of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[AuditEntry]:
    """Who changed what the model says, and every move of the active version; newest first, since the beginning."""
    return parts.stores.audit.page(after=after, limit=limit)
