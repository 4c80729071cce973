"""Server-sent events, line by line (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

import json

from service.schemas import Event


class EventParser:
    """Collects the lines of one event."""

    def __init__(self) -> None:
        self._fields: dict[str, list[str]] = {}

    def feed(self, line: str) -> Event | None:
        """Takes one line without its end; returns the event that a blank line completes."""
        if not line:
            return self._complete()
        name, _, value = line.partition(":")
        # A line that begins with a colon is a comment: the service's sign of life.
        if name:
            self._fields.setdefault(name, []).append(value.removeprefix(" "))
        return None

    def _complete(self) -> Event | None:
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        return Event(
            id=fields.get("id", [""])[-1],
            type=fields.get("event", ["message"])[-1],
            data=json.loads("\n".join(fields["data"])),
        )
