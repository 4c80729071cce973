"""Which version a request means: ``errata`` the active one, ``errata@N`` that one."""

import re
from dataclasses import dataclass
from enum import Enum

from service.errors import InvalidRequestError, NotFoundError, UnavailableError, VersionNotReachedError
from service.registry import VersionReader, VersionRegistry
from service.schemas import Activation, Schema, VersionState

ACTIVE_MODEL = "errata"
_NAMED = re.compile(r"errata@(0|[1-9][0-9]{0,14})")
MIN_VERSION_HEADER = "X-Errata-Min-Version"
VERSION_HEADER = "X-Errata-Version"


class Model(Schema):
    """A model in OpenAI's shape."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "errata"


class Lot(Enum):
    """Which part of the traffic a request belongs to: the canary's by its API key, by the draw, or not at all."""

    NAMED = "named"
    DRAWN = "drawn"
    BLANK = "blank"


@dataclass(frozen=True)
class Admission:
    """What was decided for a request at its admission.

    Attributes:
        version: the one that answers it.
        canary: the canary that it is counted for; None if there is none, or if it named its version itself.
    """

    version: int
    canary: int | None = None


class ModelList(Schema):
    """All models in OpenAI's shape."""

    object: str = "list"
    data: list[Model]


async def resolve(versions: VersionReader, model: object, min_version: str | None, lot: Lot = Lot.BLANK) -> Admission:
    """The version that a request asks for, at its admission.

    Args:
        versions: where the pointer is.
        model: the request's ``model``.
        min_version: the ``X-Errata-Min-Version`` header, digits.
        lot: the part of the traffic that it belongs to if it asks for ``errata``.

    Raises:
        InvalidRequestError: the model is no text.
        NotFoundError: no such model, or one that was never verified.
        UnavailableError: version 0 is not there yet.
        VersionNotReachedError: the version is older than the header demands.
    """
    if not isinstance(model, str):
        raise InvalidRequestError("model: must be a string", param="model")
    least = int(min_version or 0)
    if model == ACTIVE_MODEL:
        admission = _of_alias(await versions.active(), least, lot)
    else:
        admission = Admission(await _named(versions, model))
    if (number := admission.version) < least:
        error = VersionNotReachedError(
            f"version {number} answers; the request demands {min_version} or later", param=MIN_VERSION_HEADER
        )
        error.headers[VERSION_HEADER] = str(number)
        raise error
    return admission


def served(registry: VersionRegistry) -> ModelList:
    """``errata`` and every version that can be asked for by name."""
    verified = [record for record in registry.all() if record.state is VersionState.VERIFIED]
    data = [Model(id=f"{ACTIVE_MODEL}@{record.version}", created=record.created_at) for record in verified]
    if active := registry.active():
        data.insert(0, Model(id=ACTIVE_MODEL, created=registry.get(active.active).created_at))
    return ModelList(data=data)


def _of_alias(pointer: Activation | None, least: int, lot: Lot) -> Admission:
    if pointer is None:
        raise UnavailableError("version 0 is not written yet", code="no_version")
    if pointer.canary is None:
        return Admission(pointer.active)
    # A client that waits for a version would find it reached by one draw and not by the next.
    tries = lot is Lot.NAMED or (lot is Lot.DRAWN and least <= pointer.active)
    return Admission(pointer.canary if tries else pointer.active, pointer.canary)


async def _named(versions: VersionReader, model: str) -> int:
    unknown = NotFoundError(f"no model {model[:100]!r}", param="model", code="model_not_found")
    if not (match := _NAMED.fullmatch(model)):
        raise unknown
    number = int(match.group(1))
    if not await versions.is_verified(number):
        raise unknown
    return number
