"""Structured logs: one JSON object a line, a stable event name and its keys.

What a line belongs to is bound once and stands on every line: ``request_id`` on those of a request, ``run`` on those of
a run, and beside it the edits that the run adds and the requests that brought them (``of_edits``).
"""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from service.schemas import Edit

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


_MOST_NAMED = 8
_bound: ContextVar[Mapping[str, Any]] = ContextVar("errata_log", default=MappingProxyType({}))


@contextmanager
def bound(**fields: Any) -> Iterator[None]:
    """Puts fields on every line that is logged inside, in this task or thread and in those begun with its context."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


def bind(**fields: Any) -> None:
    """Puts more fields on every line, until the ``bound`` ends that this is called in."""
    _bound.set({**_bound.get(), **fields})


def of_edits(edits: Sequence[Edit]) -> dict[str, Any]:
    """How many edits, and when they are few, which and by which request each came."""
    named = edits if len(edits) <= _MOST_NAMED else ()
    return {"new_edits": len(edits), "origins": [{"edit": edit.id, "request_id": edit.request_id} for edit in named]}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; what was given as ``extra`` stands beside the event."""

    def format(self, record: logging.LogRecord) -> str:
        """Renders a record."""
        line: dict[str, Any] = {
            "at": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "logger": record.name,
            **_bound.get(),
        }
        line.update({name: value for name, value in vars(record).items() if name not in _PLAIN})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: int) -> None:
    """Sends every log record of the process to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for chatty in ("httpx", "httpcore", "celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
