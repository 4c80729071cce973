"""Timed: what the demo's own clock measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timed:
    """Seconds on the demo's own clock.

    Attributes:
        first_live_s: from the acknowledged submission to the first edit seen live, or None if none was.
        all_live_s: to the last one.
        rollback_s: the rollback call.
        first_answer_s: from the beginning of that call to the first whole answer after it.
        activate_s: the call that activated the version again.
    """

    first_live_s: float | None
    all_live_s: float | None
    rollback_s: float
    first_answer_s: float
    activate_s: float
