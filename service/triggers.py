"""When a run is due. Pure: it is told what is and answers yes or no."""

from collections.abc import Mapping, Sequence
from itertools import takewhile

from service.schemas import EditStatus, Run, RunStatus, Trigger
from service.settings import Settings

BACKOFF_RUNS = 8
"""How many of the newest runs ``due`` looks at for failures in a row; more do not lengthen its pause."""


def due(
    settings: Settings,
    *,
    counts: Mapping[EditStatus, int],
    recent: Sequence[Run],
    oldest_queued_at: int | None,
    now: float,
) -> bool:
    """Whether a run is to be requested, given that none is queued or under way.

    Args:
        settings: the trigger and its numbers.
        counts: edits by status.
        recent: the newest runs, newest first.
        oldest_queued_at: since when the oldest queued edit waits, Unix seconds.
        now: Unix seconds.
    """
    queued, retracting = counts[EditStatus.QUEUED], counts[EditStatus.RETRACTING]
    if settings.trigger is Trigger.MANUAL or not (queued or retracting):
        return False
    idle_s = now - (recent[0].finished_at or now) if recent else now
    if idle_s < _pause_s(settings, recent):
        return False
    match settings.trigger:
        case Trigger.BATCH:
            waited_s = now - (oldest_queued_at or now)
            return queued >= settings.trigger_batch_edits or retracting > 0 or waited_s >= settings.trigger_max_wait_s
        case Trigger.INTERVAL:
            return idle_s >= settings.trigger_interval_s
        case _:
            return True


def _pause_s(settings: Settings, recent: Sequence[Run]) -> float:
    """Twice as long after each further failure: what fails by itself must not keep the machine busy for ever."""
    failures = sum(1 for _ in takewhile(lambda run: run.status is RunStatus.FAILED, recent))
    return settings.retry_wait_s * 2 ** (failures - 1) if failures else 0.0
