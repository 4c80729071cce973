"""Waiting until edits are at rest, as a plan of calls that either client carries out."""

import time
from collections.abc import Callable, Generator, Iterable, Mapping

from service.client import calls
from service.client.calls import Call
from service.client.errors import WaitTimeoutError
from service.schemas import EditState, EditStatus

AT_REST = frozenset(EditStatus) - {
    EditStatus.QUEUED,
    EditStatus.TRAINING,
    EditStatus.TRAINED,
    EditStatus.RETRACTING,
}
"""Statuses that an edit leaves only when somebody asks for it."""

Seen = Callable[[EditState], None]
Plan = Generator[Call[EditState], EditState, dict[str, EditState]]

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

    Raises:
        WaitTimeoutError: not all are at rest in time.
    """
    deadline = clock() + timeout_s
    states: dict[str, EditState] = {}
    order = list(dict.fromkeys(edit_ids))
    moving = order
    while True:
        for edit_id in moving:
            state = yield calls.status(edit_id, 0)
            _note(states, state, on_change)
        moving = [edit_id for edit_id in moving if states[edit_id].status not in AT_REST]
        if not moving:
            return {edit_id: states[edit_id] for edit_id in order}
        left_s = deadline - clock()
        if left_s <= 0:
            raise WaitTimeoutError(_not_yet(moving, states, timeout_s))
        state = yield calls.status(moving[0], min(_STEP_S, left_s))
        _note(states, state, on_change)


def _note(states: dict[str, EditState], state: EditState, on_change: Seen | None) -> None:
    if on_change and states.get(state.id) != state:
        on_change(state)
    states[state.id] = state


def _not_yet(moving: list[str], states: Mapping[str, EditState], timeout_s: float) -> str:
    first = states[moving[0]]
    more = f" and {len(moving) - 1} more" if len(moving) > 1 else ""
    return f"{first.id} is still {first.status}{more} after {timeout_s:g} s"
