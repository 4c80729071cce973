"""RunStore: training runs, the lease on the one that is under way, and its fencing token.

One run at a time: a run is *current* from its claim until its version is active or given up. Whoever holds it renews a
lease; a run without a lease is taken over, and its token, no longer the newest, cannot commit.
"""

import json
import secrets
import time
from collections.abc import Callable, Mapping
from typing import cast

from redis import Redis

from service.errors import ConflictError, InvalidRequestError, NotFoundError
from service.keys import RunKeys
from service.lua import Scripts
from service.metrics.catalogue import RUN_PHASE_SECONDS
from service.metrics.kept import observe
from service.schemas import EditError, EditStatus, EpochLoss, Page, Run, RunStatus, Trigger

WORKER_SILENCE_S = 15.0
"""A train worker that was silent so long is taken for gone."""

_TIMING = "timing:"
_EPOCH = "epoch:"


class LeaseLostError(ConflictError):
    """The caller may no longer act for the run: it was taken over, it has ended, or another has judged its version."""

    default_code = "lease_lost"


class RunCancelledError(ConflictError):
    """Somebody cancelled the run."""

    default_code = "run_cancelled"


class RunStore:
    """Runs, and who may run."""

    def __init__(
        self,
        redis: Redis,
        *,
        events_max: int,
        lease_s: float,
        max_attempts: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._redis = redis
        self._keys = RunKeys()
        self._max_attempts = max_attempts
        self._lease_ms = int(lease_s * 1000)
        self._clock = clock

        scripts = Scripts(redis, events_max=events_max, clock=clock)
        self._request = scripts.load("request_run")
        self._start = scripts.load("start_run")
        self._renew = scripts.load("renew_run")
        self._hand_over = scripts.load("hand_over")
        self._cancel = scripts.load("cancel_run")
        self._progress = scripts.load("progress")
        self._finish = scripts.load("finish_run")

    def request(self, trigger: Trigger) -> tuple[Run, bool]:
        """The queued run, made if there is none; and whether it was made."""
        answer = self._request({"run": new_run_id(), "trigger": trigger})
        return self.get(answer["run"]), bool(answer.get("created"))

    def start(self, run_id: str) -> Run | None:
        """Makes a queued run current; None if another is under way or this one is not queued any more."""
        answer = self._start({"run": run_id, "lease_ms": self._lease_ms})
        return self.get(run_id) if "token" in answer else None

    def renew(self, run: Run) -> bool:
        """Renews the lease; returns whether the run is asked to stop.

        Raises:
            LeaseLostError: the run was taken over.
        """
        answer = self._renew({"run": run.id, "token": run.token, "lease_ms": self._lease_ms})
        if answer.get("lost"):
            raise LeaseLostError(f"run {run.id} was taken over")
        return bool(answer["cancel"])

    def hand_over(self, run: Run, version: int) -> None:
        """The run's edit set is that of a version that is there, which waits for its verification.

        Raises:
            LeaseLostError: the run was taken over.
            RunCancelledError: somebody cancelled it.
        """
        match self._hand_over({"run": run.id, "token": run.token, "version": version}).get("refused"):
            case "fenced":
                raise LeaseLostError(f"run {run.id} was taken over")
            case "cancelled":
                raise RunCancelledError(f"run {run.id} was cancelled")

    def finish(self, run_id: str, status: RunStatus, *, error: EditError | None = None) -> bool:
        """Ends a run; returns False if it had ended before."""
        return self._end(run_id, status, error, only=None, back=None)

    def give_up(self, run: Run, status: RunStatus, *, error: EditError | None = None, refund: bool = False) -> None:
        """Ends the training of a run and gives its edits back, as `EditStore.unclaim` does and at once.

        Raises:
            LeaseLostError: it is past its training or has ended; this call may have done it, and its answer been lost.
        """
        back = unclaim_terms(max_attempts=self._max_attempts, error=error, refund=refund)
        if not self._end(run.id, status, error, only=RunStatus.TRAINING, back=back):
            raise LeaseLostError(f"run {run.id} was taken over")

    def cancel(self, run_id: str) -> Run:
        """Asks a run to stop, and the triggers to wait for news.

        Raises:
            NotFoundError: no such run.
            ConflictError: it is past training.
        """
        self.get(run_id)
        if refused := self._cancel({"run": run_id}).get("refused"):
            raise ConflictError(f"run {run_id} is {refused}", param="id", code="run_not_cancellable")
        # Whether it began meanwhile is decided at once.
        self._end(run_id, RunStatus.CANCELLED, None, only=RunStatus.QUEUED, back=None)
        return self.get(run_id)

    def update(self, run: Run, **fields: str | float) -> None:
        """Writes progress fields of a run.

        Raises:
            LeaseLostError: the run was taken over.
        """
        payload = {"run": run.id, "token": run.token, "fields": {name: str(value) for name, value in fields.items()}}
        if self._progress(payload).get("lost"):
            raise LeaseLostError(f"run {run.id} was taken over")

    def add_timing(self, run: Run, phase: str, seconds: float) -> None:
        """Adds one phase's duration. Raises as `update` does."""
        self.update(run, **{_TIMING + phase: round(seconds, 4)})
        observe(self._redis, RUN_PHASE_SECONDS, seconds, phase)

    def add_epoch(self, run: Run, epoch: EpochLoss, *, eta_s: float | None) -> None:
        """Adds an epoch's loss. Raises as `update` does."""
        # A field for each: nobody has to read what is there, and a repeated call changes nothing.
        named = {f"{_EPOCH}{epoch.epoch}": epoch.model_dump_json()}
        self.update(run, **named, eta_s="" if eta_s is None else round(eta_s, 1))

    def get(self, run_id: str) -> Run:
        """One run.

        Raises:
            NotFoundError: no such run.
        """
        fields = cast(dict[str, str], self._redis.hgetall(self._keys.run + run_id))
        if not fields:
            raise NotFoundError(f"no run {run_id!r}", param="id", code="run_not_found")
        return _run(fields)

    def page(self, *, after: str | None, limit: int) -> Page[Run]:
        """Newest first, after the given id.

        Raises:
            InvalidRequestError: ``after`` is no run's id.
        """
        top = "+inf"
        if after is not None:
            if (score := self._redis.zscore(self._keys.runs, after)) is None:
                raise InvalidRequestError(f"no run {after!r}", param="after", code="run_not_found")
            top = f"({score}"
        ids = cast(list[str], self._redis.zrevrangebyscore(self._keys.runs, top, "-inf", start=0, num=limit + 1))
        return Page[Run](data=[self.get(run_id) for run_id in ids[:limit]], has_more=len(ids) > limit)

    def current(self) -> Run | None:
        """The run under way."""
        run_id = cast(str | None, self._redis.get(self._keys.current))
        return self.get(run_id) if run_id else None

    def queued(self) -> Run | None:
        """The run that waits."""
        run_id = cast(str | None, self._redis.get(self._keys.next))
        return self.get(run_id) if run_id else None

    def leased(self) -> bool:
        """Whether the current run's lease has not expired."""
        return bool(self._redis.exists(self._keys.lease))

    def idle(self) -> bool:
        """Whether no run waits or is under way, and no cancelled one keeps the triggers waiting."""
        return not self._redis.exists(self._keys.hold, self._keys.next, self._keys.current)

    def beat(self, worker: str) -> None:
        """Records a train worker's heartbeat."""
        self._redis.zadd(self._keys.workers, {worker: self._clock()})

    def leave(self, worker: str) -> None:
        """Forgets a train worker that stops."""
        self._redis.zrem(self._keys.workers, worker)

    def workers(self, *, within_s: float) -> list[str]:
        """Train workers heard of within so many seconds."""
        since = self._clock() - within_s
        return cast(list[str], self._redis.zrangebyscore(self._keys.workers, since, "+inf"))

    def _end(
        self,
        run_id: str,
        status: RunStatus,
        error: EditError | None,
        *,
        only: RunStatus | None,
        back: Mapping[str, object] | None,
    ) -> bool:
        payload = {"run": run_id, "status": status, "error": _error_json(error), "only": only, "back": back}
        return "ended" not in self._finish(payload)


def new_run_id() -> str:
    """An id that no run has."""
    return f"run_{secrets.token_hex(12)}"


def unclaim_terms(
    *,
    max_attempts: int,
    error: EditError | None,
    refund: bool,
    trained_to: EditStatus = EditStatus.QUEUED,
) -> dict[str, object]:
    """How the edits move that a run gives back: the argument of ``unclaim`` in ``prelude.lua`` beside the run.

    Args:
        max_attempts: an edit with so many fails instead of being queued again.
        error: what went wrong, kept with the edits.
        refund: the attempt does not count.
        trained_to: where edits of a committed version go; QUEUED or HELD.
    """
    return {"max_attempts": max_attempts, "error": _error_json(error), "refund": refund, "trained_to": trained_to}


def _error_json(error: EditError | None) -> str:
    return error.model_dump_json() if error else ""


def _number(text: str | None) -> int | None:
    return int(text) if text else None


def _epochs(fields: Mapping[str, str]) -> list[EpochLoss]:
    found = [EpochLoss.model_validate_json(value) for name, value in fields.items() if name.startswith(_EPOCH)]
    return sorted(found, key=lambda epoch: epoch.epoch)


def _run(fields: Mapping[str, str]) -> Run:
    return Run(
        id=fields["id"],
        status=RunStatus(fields["status"]),
        trigger=Trigger(fields["trigger"]),
        token=_number(fields.get("token")),
        parent=_number(fields.get("parent")),
        epoch_of_activation=_number(fields.get("epoch_of_activation")),
        version=_number(fields.get("version")),
        edits=int(fields.get("edits", 0)),
        new_edits=int(fields.get("new_edits", 0)),
        phase=fields.get("phase", ""),
        epochs=_epochs(fields),
        eta_s=float(fields["eta_s"]) if fields.get("eta_s") else None,
        timings={name.removeprefix(_TIMING): float(s) for name, s in fields.items() if name.startswith(_TIMING)},
        error=json.loads(fields.get("error") or "null"),
        created_at=int(fields["created_at"]),
        started_at=_number(fields.get("started_at")),
        verifying_since=_number(fields.get("verifying_since")),
        finished_at=_number(fields.get("finished_at")),
    )
