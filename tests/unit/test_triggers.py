"""When a run is due."""

import pytest

from service.schemas import EditStatus, Run, RunStatus, Trigger
from service.settings import Settings
from service.triggers import due

NOW = 10_000.0


def run(status: RunStatus, *, ended_s_ago: float) -> Run:
    return Run(
        id="run_1",
        status=status,
        trigger=Trigger.IMMEDIATE,
        token=1,
        parent=0,
        epoch_of_activation=0,
        version=None,
        edits=0,
        new_edits=0,
        phase="",
        epochs=[],
        eta_s=None,
        timings={},
        error=None,
        created_at=0,
        started_at=0,
        verifying_since=None,
        finished_at=int(NOW - ended_s_ago),
    )


def asked(
    trigger: Trigger, *, queued: int = 0, retracting: int = 0, recent: list[Run] | None = None, waited_s: float = 0
) -> bool:
    settings = Settings(trigger=trigger, trigger_batch_edits=5, trigger_max_wait_s=60, trigger_interval_s=100)
    counts = dict.fromkeys(EditStatus, 0) | {EditStatus.QUEUED: queued, EditStatus.RETRACTING: retracting}
    return due(settings, counts=counts, recent=recent or [], oldest_queued_at=int(NOW - waited_s), now=NOW)


@pytest.mark.parametrize("trigger", Trigger)
def test_nothing_to_do_is_never_due(trigger: Trigger) -> None:
    assert not asked(trigger, recent=[run(RunStatus.SUCCEEDED, ended_s_ago=1e6)])


def test_the_immediate_trigger_is_due_with_one_edit_or_one_retraction() -> None:
    assert asked(Trigger.IMMEDIATE, queued=1)
    assert asked(Trigger.IMMEDIATE, retracting=1)


def test_the_manual_trigger_is_never_due() -> None:
    assert not asked(Trigger.MANUAL, queued=1000, retracting=1)


def test_the_batch_trigger_waits_for_its_size_or_its_time() -> None:
    assert not asked(Trigger.BATCH, queued=4, waited_s=59)
    assert asked(Trigger.BATCH, queued=5)
    assert asked(Trigger.BATCH, queued=1, waited_s=60)
    assert asked(Trigger.BATCH, retracting=1)


def test_the_interval_trigger_counts_from_the_last_run() -> None:
    assert asked(Trigger.INTERVAL, queued=1)
    assert not asked(Trigger.INTERVAL, queued=1, recent=[run(RunStatus.SUCCEEDED, ended_s_ago=99)])
    assert asked(Trigger.INTERVAL, queued=1, recent=[run(RunStatus.SUCCEEDED, ended_s_ago=100)])


@pytest.mark.parametrize(("failures", "pause_s"), [(1, 10), (2, 20), (4, 80)])
def test_the_pause_doubles_with_each_failure_in_a_row(failures: int, pause_s: float) -> None:
    before = [run(RunStatus.SUCCEEDED, ended_s_ago=5000), run(RunStatus.FAILED, ended_s_ago=6000)]

    def failed(ended_s_ago: float) -> list[Run]:
        return [run(RunStatus.FAILED, ended_s_ago=ended_s_ago)] * failures + before

    assert not asked(Trigger.IMMEDIATE, queued=1, recent=failed(pause_s - 1))
    assert asked(Trigger.IMMEDIATE, queued=1, recent=failed(pause_s))
