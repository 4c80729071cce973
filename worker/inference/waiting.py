"""How a node's processes on a CPU wait for one another (records 0030 and 0036)."""

import time
from collections.abc import Callable

# Short against a step of the model, long against a look.
_BETWEEN_LOOKS_S = 0.0002
# Longer than from one step of the model to the next: who is in the middle of answers does not sleep.
_SPIN_S = 0.02
# Longer than two looks of one wait lie apart, shorter than what is done between two waits.
_SAME_WAIT_S = 0.0005


def sleeping() -> None:
    """Wait for the other process: sleep between two looks."""
    time.sleep(_BETWEEN_LOOKS_S)


def patient(spin: Callable[[], None]) -> Callable[[], None]:
    """Return what waits as `spin` does at first and, where a wait lasts, by sleeping between two looks.

    What is returned is called before every look and is not told when a wait begins: calls that follow each other at
    once are one wait.
    """
    began = ended = 0.0

    def wait() -> None:
        nonlocal began, ended
        now = time.monotonic()
        if now - ended > _SAME_WAIT_S:
            began = now
        if now - began < _SPIN_S:
            spin()
        else:
            sleeping()
        ended = time.monotonic()

    return wait
