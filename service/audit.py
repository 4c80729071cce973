"""The audit log: who changed what the model says. Its entries are written by the scripts that make the changes.

A script takes the actor from its context, so whoever calls a store says on whose behalf with ``acting``.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import cast

from redis import Redis

from service.keys import AuditKeys
from service.schemas import AuditEntry, Page


@dataclass(frozen=True)
class Actor:
    """Who acts: an API key's id and name, or one of ours; and in which request or run.

    The system itself is ``errata``, the command line ``cli``, a caller of an open address ``anonymous``.
    """

    actor: str = "errata"
    actor_name: str = ""
    request_id: str = ""
    run: str = ""


SYSTEM = Actor()
_current: ContextVar[Actor] = ContextVar("actor", default=SYSTEM)


@contextmanager
def acting(actor: Actor) -> Iterator[None]:
    """What the stores change within is logged as this actor's, also in threads that inherit the context."""
    token = _current.set(actor)
    try:
        yield
    finally:
        _current.reset(token)


def audit_context() -> Mapping[str, str]:
    """Who acts, as the scripts write it into the log."""
    return asdict(_current.get())


class AuditLog:
    """Reads the log. Nothing in Errata removes from it."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._key = AuditKeys().audit

    def page(self, *, after: str | None, limit: int) -> Page[AuditEntry]:
        """Newest first, after the given id."""
        top = "+" if after is None else f"({after}"
        rows = cast(list[tuple[str, dict[str, str]]], self._redis.xrevrange(self._key, max=top, count=limit + 1))
        entries = [_entry(entry_id, fields) for entry_id, fields in rows]
        return Page[AuditEntry](data=entries[:limit], has_more=len(entries) > limit)


def _entry(entry_id: str, fields: Mapping[str, str]) -> AuditEntry:
    return AuditEntry(
        id=entry_id,
        action=fields["action"],
        actor=fields["actor"],
        actor_name=fields["actor_name"] or None,
        request_id=fields["request_id"] or None,
        run=fields["run"] or None,
        version=int(fields["version"]) if fields["version"] else None,
        data=json.loads(fields["data"]),
        created_at=int(fields["at"]),
    )
