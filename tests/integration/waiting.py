"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable


def until(
    holds: Callable[[], bool],
    *,
    within_s: float = 60,
    otherwise: Callable[[], str] = lambda: "it did not happen in time",
) -> None:
    """Waits until something holds, and fails with what is said otherwise."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.05)
