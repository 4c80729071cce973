"""Routes of versions and of the active pointer."""

from typing import Annotated

from fastapi import APIRouter, Path, Query

from service.api.dependencies import PartsDep
from service.api.errors import RESPONSES
from service.schemas import ActivateRequest, Activation, Page, RollbackRequest, Version, VersionDiff

router = APIRouter(tags=["versions"], responses=RESPONSES)

# Redis counts bits and scores exactly up to this.
_LARGEST = 2**53
Number = Annotated[int, Path(ge=0, le=_LARGEST)]


@router.get("/versions")
def list_versions(
    parts: PartsDep,
    after: Annotated[int | None, Query(ge=0, le=_LARGEST, description="The last number of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Page[Version]:
    """Committed versions, newest first."""
    registry = parts.stores.registry
    records, more = registry.page(after=after, limit=limit)
    canary = parts.stores.canaries.current()
    return Page[Version](data=[registry.shown(record, canary=canary) for record in records], has_more=more)


@router.get("/versions/{number}")
def get_version(number: Number, parts: PartsDep) -> Version:
    """One version, and the nodes that hold it."""
    registry = parts.stores.registry
    resident = parts.reconciler.fleet.holders(number)
    return registry.shown(registry.get(number), resident=resident, canary=parts.stores.canaries.current())


@router.get("/versions/{number}/diff/{other}")
def diff(number: Number, other: Number, parts: PartsDep) -> VersionDiff:
    """Edits that are in one version and not in the other."""
    only = parts.stores.registry.difference(number, other)
    edits = parts.stores.edits
    return VersionDiff(
        only_in={str(version): edits.by_sequence(bits) for version, bits in zip((number, other), only, strict=True)}
    )


@router.post("/versions/{number}/activate", status_code=202)
def activate(number: Number, parts: PartsDep, body: ActivateRequest | None = None) -> Activation:
    """Makes a verified version the one that ``errata`` means, and ends a canary. It is served when this answers."""
    activation = parts.reconciler.activate(number, expected_active=body.expected_active if body else None)
    parts.reconciler.pull()
    return activation


@router.post("/rollback", status_code=202)
def rollback(parts: PartsDep, body: RollbackRequest | None = None) -> Activation:
    """Activates an older version, by default the one that was active before; edits that it lacks are held."""
    return parts.reconciler.roll_back(body.to if body else None)
