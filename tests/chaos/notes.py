"""What went wrong, and threads that never end silently."""

import logging
import threading
import traceback
from abc import abstractmethod
from collections import Counter

from service.client import ApiError, ClientError

log = logging.getLogger(__name__)

# Conflict, unknown version, version not reached, busy, and a part that is away: what a client is told in trouble.
_TOLD_IN_TROUBLE = frozenset({409, 404, 412, 429, 502, 503, 504})


class Notes:
    """Shared by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wrong: list[str] = []
        self.counts: Counter[str] = Counter()

    def wrong(self, what: str) -> None:
        """Something that must not happen did."""
        log.error("%s", what)
        with self._lock:
            self._wrong.append(what)

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def refused(self, error: ClientError) -> None:
        """A request came to nothing, which is right in trouble unless the service says that it broke."""
        if isinstance(error, ApiError) and error.status not in _TOLD_IN_TROUBLE:
            self.wrong(f"a request was answered with {error.status} {error.code}: {error.message}")
        self.count("requests that were refused or not answered")

    def all_wrong(self) -> list[str]:
        with self._lock:
            return list(self._wrong)


class Loop(threading.Thread):
    """Does a step again and again until it is stopped."""

    def __init__(self, notes: Notes, *, every_s: float) -> None:
        super().__init__(daemon=True)
        self.notes = notes
        self._every_s = every_s
        self._stopped = threading.Event()

    @abstractmethod
    def step(self) -> None: ...

    def run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.step()
            except ClientError as error:
                self.notes.refused(error)
            except Exception:  # noqa: BLE001 - a checker that died would find nothing wrong
                self.notes.wrong(f"{type(self).__name__} broke:\n{traceback.format_exc()}")
                return
            self._stopped.wait(self._every_s)

    def stop(self) -> None:
        self._stopped.set()
        self.join(120)
        if self.is_alive():
            self.notes.wrong(f"{type(self).__name__} does not end")
