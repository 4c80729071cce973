"""Waiting until edits are at rest, as a plan of calls that either client carries out."""

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass

from service.client import calls
from service.client.calls import Call
from service.client.errors import ApiError, WaitTimeoutError
from service.schemas import EditState, EditStatus

AT_REST = frozenset(EditStatus) - {
    EditStatus.QUEUED,
    EditStatus.TRAINING,
    EditStatus.TRAINED,
    EditStatus.RETRACTING,
}
"""Statuses that an edit leaves only on request."""


@dataclass(frozen=True)
class Step:
    """A call to make after a pause."""

    call: Call[EditState]
    pause_s: float


Seen = Callable[[EditState], None]
Plan = Generator[Step, EditState, dict[str, EditState]]

# A long-poll ends when the status changes; this short, the callback sees the progress of training too.
_STEP_S = 1.0


def waiting(
    edit_ids: Iterable[str],
    *,
    timeout_s: float,
    on_change: Seen | None,
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """Yields the calls to make and takes their answers; returns the last state of each edit, in the order given.

    An ``ApiError`` is thrown in where its call was yielded; a key that asks too often asks again when it may.

    Raises:
        WaitTimeoutError: not all are at rest in time.
    """
    deadline = clock() + timeout_s
    states: dict[str, EditState] = {}
    order = list(dict.fromkeys(edit_ids))
    moving = order
    while True:
        for edit_id in moving:
            state = yield from _asked(calls.status(edit_id, 0), deadline, clock)
            _note(states, state, on_change)
        moving = [edit_id for edit_id in moving if states[edit_id].status not in AT_REST]
        if not moving:
            return {edit_id: states[edit_id] for edit_id in order}
        left_s = deadline - clock()
        if left_s <= 0:
            raise WaitTimeoutError(_not_yet(moving, states, timeout_s))
        state = yield from _asked(calls.status(moving[0], min(_STEP_S, left_s)), deadline, clock)
        _note(states, state, on_change)


def _asked(call: Call[EditState], deadline: float, clock: Callable[[], float]) -> Generator[Step, EditState, EditState]:
    pause_s = 0.0
    while True:
        try:
            return (yield Step(call, pause_s))
        except ApiError as error:
            if error.status != 429 or error.retry_after_s is None:
                raise
            pause_s = error.retry_after_s
            if clock() + pause_s > deadline:
                raise WaitTimeoutError(f"no more can be asked in time: {error.message}") from error


def _note(states: dict[str, EditState], state: EditState, on_change: Seen | None) -> None:
    if on_change and states.get(state.id) != state:
        on_change(state)
    states[state.id] = state


def _not_yet(moving: list[str], states: Mapping[str, EditState], timeout_s: float) -> str:
    first = states[moving[0]]
    more = f" and {len(moving) - 1} more" if len(moving) > 1 else ""
    return f"{first.id} is still {first.status}{more} after {timeout_s:g} s"
