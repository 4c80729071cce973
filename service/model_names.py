"""How a version is named towards clients and nodes: as a model and in headers.

A node knows the models' names too, from worker/inference/resolver.py, which imports nothing of the service.
"""

import re

ACTIVE_MODEL = "errata"
"""The model that the active version answers, or the canary."""

VERSION_HEADER = "X-Errata-Version"
"""Of an answer: the number of the version that it came from."""

MIN_VERSION_HEADER = "X-Errata-Min-Version"
"""Of a request: the number of the oldest version that may answer it."""

# Redis scripts and JSON readers compute with doubles, which are exact up to 2**53: 15 digits always are.
MAX_VERSION_DIGITS = 15
_VERSION_NAME = re.compile(rf"{ACTIVE_MODEL}@(0|[1-9][0-9]{{0,{MAX_VERSION_DIGITS - 1}}})")


def version_name(version: int) -> str:
    """The model name of a version."""
    return f"{ACTIVE_MODEL}@{version}"


def version_of(model: str) -> int | None:
    """The number of the version that a model name asks for; None if it is no version's name."""
    match = _VERSION_NAME.fullmatch(model)
    return int(match[1]) if match else None
