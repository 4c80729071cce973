"""What is put back into Redis when it was lost, from what the version store has."""

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

from redis import Redis

from service.lua import Scripts
from service.runs import new_run_id
from service.schemas import StoredEdit, Trigger
from service.store import stored_fields


class Recovery:
    """Edits as versions keep them, and a beginning for the newest of these versions."""

    def __init__(self, redis: Redis, *, events_max: int, clock: Callable[[], float] = time.time) -> None:
        scripts = Scripts(redis, events_max=events_max, clock=clock)
        self._restore = scripts.load("restore")
        self._begin = scripts.load("begin")

    def restore(self, edits: Sequence[StoredEdit], version: int) -> list[str]:
        """Puts back what Redis lost of a version's edits; returns the ids that were missing.

        They are held, or superseded by an edit of the same prompt that is there before: call it for the newest version
        first.
        """
        return cast(list[str], self._restore({"edits": [_fields(edit) for edit in edits], "version": version}))

    def begin(self, version: int | None) -> str | None:
        """Where no version is active: makes version 0 active, and a run that verifies a version with its held edits.

        Returns the run's id; None if there is no such version, or if a version is active, and nothing was done.
        """
        run = new_run_id()
        answer = self._begin({"run": run, "version": version, "trigger": Trigger.MANUAL})
        return None if version is None or answer.get("active") else run


def _fields(edit: StoredEdit) -> dict[str, Any]:
    record = edit.model_dump(exclude={"id", "sequence"})
    return {"id": edit.id, "seq": edit.sequence, **stored_fields(edit, record)}
