"""Redis scripts: what must happen at once or not at all. Each runs with ``prelude.lua`` in front.

A script gets two JSON arguments, the context (keys, the status table, the time, who acts) and its own payload, and
answers JSON. Keys are computed inside the scripts, so the store wants one Redis, not a cluster.
"""

import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from service.audit import audit_context
from service.keys import all_keys
from service.metrics.catalogue import EDIT_TO_LIVE
from service.transitions import TABLE

Context = Callable[[], Mapping[str, Any]]


class Scripts:
    """The scripts as one store calls them, with its clock and its bound on the event stream."""

    def __init__(self, redis: Redis, *, events_max: int, clock: Callable[[], float]) -> None:
        self._redis = redis
        self._clock = clock
        self._same = {
            "keys": all_keys(),
            "transitions": TABLE,
            "events_max": events_max,
            "to_live_bounds": EDIT_TO_LIVE.buckets,
        }

    def load(self, name: str) -> "Script":
        """The script in ``name.lua``."""
        return Script(self._redis, name, self._context)

    def _context(self) -> Mapping[str, Any]:
        return {**self._same, "now": int(self._clock()), **audit_context()}


class Script:
    """One script, loaded once and called by its hash."""

    def __init__(self, redis: Redis, name: str, context: Context) -> None:
        source = files(__name__)
        self._context = context
        self._text = source.joinpath("prelude.lua").read_text() + source.joinpath(f"{name}.lua").read_text()
        self._script = redis.register_script(self._text)

    def __call__(self, payload: Mapping[str, Any]) -> Any:
        """Runs the script atomically and returns its decoded answer."""
        return json.loads(self._script(args=self._arguments(payload)))

    async def awaited(self, redis: AsyncRedis, payload: Mapping[str, Any]) -> Any:
        """The same over another client, which no thread waits for."""
        return json.loads(await redis.register_script(self._text)(args=self._arguments(payload)))

    def _arguments(self, payload: Mapping[str, Any]) -> list[str]:
        return [json.dumps(self._context()), json.dumps(payload)]
