"""The whole embedded stack, in a home of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from running_stack import RunningStack

from service.client import ErrataClient


@pytest.fixture(scope="module")
def running(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    started = RunningStack(tmp_path_factory.mktemp("errata"))
    try:
        started.up()
        yield started
    finally:
        started.down()


@pytest.fixture
def client(running: RunningStack) -> Iterator[ErrataClient]:
    with ErrataClient(running.url, timeout_s=120) as connected:
        yield connected
