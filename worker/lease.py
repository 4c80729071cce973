"""Keeps a run's lease while it trains, and hears whether it is to stop."""

import logging
import threading
import time
from types import TracebackType
from typing import Self

from redis.exceptions import RedisError

from service.runs import LeaseLostError, RunStore
from service.schemas import Run

log = logging.getLogger(__name__)


class Lease:
    """Renews a run's lease from a thread of its own, because training holds the main one for minutes."""

    def __init__(
        self, runs: RunStore, run: Run, *, every_s: float, longest_s: float, stopping: threading.Event
    ) -> None:
        self._runs = runs
        self._run = run
        self._every_s = every_s
        self._deadline = time.monotonic() + longest_s
        self._stopping = stopping
        self._ended = threading.Event()
        self._cancelled = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        """Starts renewing."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Stops renewing."""
        self._ended.set()
        self._thread.join()

    @property
    def cancelled(self) -> bool:
        """Whether a client asked the run to stop."""
        return self._cancelled.is_set()

    @property
    def lost(self) -> bool:
        """Whether the run was taken over."""
        return self._lost.is_set()

    @property
    def overdue(self) -> bool:
        """Whether the run takes longer than it may."""
        return time.monotonic() > self._deadline

    def should_stop(self) -> bool:
        """Whether training is to end now: cancelled, taken over, overdue, or the worker shuts down."""
        return self.cancelled or self.lost or self.overdue or self._stopping.is_set()

    def _renew(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                if self._runs.renew(self._run):
                    self._cancelled.set()
            except LeaseLostError:
                self._lost.set()
                return
            except RedisError as error:
                # Redis may come back before the lease expires; the fencing token decides at commit if it does not.
                log.warning("lease.not_renewed", extra={"run": self._run.id, "reason": repr(error)})
