"""How often a key may ask: a minute's worth at once, then evenly (the generic cell rate algorithm)."""

import time
from collections.abc import Callable

from service.api_keys import ApiKey

_MINUTE_S = 60.0


class Rates:
    """Requests of each key, counted in this process: one number a key, however many requests."""

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._paid_until: dict[str, float] = {}

    def wait_s(self, key: ApiKey) -> float:
        """Takes one request; returns 0, or the seconds until the key may ask again if it may not now."""
        if key.rate is None:
            return 0.0
        now, each = self._monotonic(), _MINUTE_S / key.rate
        paid_until = max(now, self._paid_until.get(key.id, now)) + each
        if (wait_s := paid_until - now - _MINUTE_S) > 1e-6:
            return wait_s
        self._paid_until[key.id] = paid_until
        return 0.0
