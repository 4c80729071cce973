"""Which version a request means: ``errata`` the active one, ``errata@N`` that one."""

from dataclasses import dataclass
from enum import Enum

from service.errors import InvalidRequestError, NotFoundError, UnavailableError, VersionNotReachedError
from service.model_names import ACTIVE_MODEL, MIN_VERSION_HEADER, VERSION_HEADER, version_name, version_of
from service.registry import VersionReader, VersionRegistry
from service.schemas import Activation, Schema, VersionState


class Model(Schema):
    """A model in OpenAI's shape."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "errata"


class CanaryAssignment(Enum):
    """Why a request for ``errata`` is the canary's: by its API key, by the random sample, or not at all."""

    BY_KEY = "by_key"
    SAMPLED = "sampled"
    NONE = "none"


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


async def resolve(
    versions: VersionReader,
    model: object,
    min_version: str | None,
    assignment: CanaryAssignment = CanaryAssignment.NONE,
) -> Admission:
    """The version that a request asks for, at its admission.

    Args:
        versions: where the pointer is.
        model: the request's ``model``.
        min_version: the ``X-Errata-Min-Version`` header, digits.
        assignment: whether it is the canary's if it asks for ``errata``.

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
        admission = _of_alias(await versions.active(), least, assignment)
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
    data = [Model(id=version_name(record.version), created=record.created_at) for record in verified]
    if active := registry.active():
        data.insert(0, Model(id=ACTIVE_MODEL, created=registry.get(active.active).created_at))
    return ModelList(data=data)


def _of_alias(pointer: Activation | None, least: int, assignment: CanaryAssignment) -> Admission:
    if pointer is None:
        raise UnavailableError("version 0 is not written yet", code="no_version")
    if pointer.canary is None:
        return Admission(pointer.active)
    # A client that waits for a version would find it reached by one sample and not by the next.
    sampled = assignment is CanaryAssignment.SAMPLED and least <= pointer.active
    tries = sampled or assignment is CanaryAssignment.BY_KEY
    return Admission(pointer.canary if tries else pointer.active, pointer.canary)


async def _named(versions: VersionReader, model: str) -> int:
    unknown = NotFoundError(f"no model {model[:100]!r}", param="model", code="model_not_found")
    number = version_of(model)
    if number is None or not await versions.is_verified(number):
        raise unknown
    return number
