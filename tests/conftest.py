"""Fixtures that tests of every kind share."""

from pathlib import Path

import pytest

from service.stack import default_model as _default_model


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The folder of the default model, built the first time."""
    return _default_model(print)
