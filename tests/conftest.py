"""Fixtures that tests of every kind share."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_clock import Clock

from service.stack import default_model as _default_model


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The folder of the default model, built the first time."""
    return _default_model(print)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """The application takes over the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture
def clock() -> Clock:
    return Clock()
