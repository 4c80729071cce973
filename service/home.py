"""The folder of one stack, ``ERRATA_HOME``: the record of what was started, its secrets, and the lock of a start."""

import fcntl
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.settings import Settings

SUPERVISOR_PASSWORD = "SUPERVISOR_PASSWORD"  # noqa: S105 - the name under which it is kept
_RECORD = "stack.json"
_SECRETS = "secrets.json"
_LOCK = "up.lock"


@dataclass(frozen=True)
class StackRecord:
    """What ``stack.json`` and ``secrets.json`` keep of a started stack.

    Attributes:
        url: base URL of its API.
        supervisor_port: port of its supervisord, on loopback.
        environment: its settings as variables, without secrets.
        secrets: its secrets as variables, and supervisord's password.
    """

    url: str
    supervisor_port: int
    environment: Mapping[str, str]
    secrets: Mapping[str, str]

    @property
    def password(self) -> str:
        """What supervisord demands; the embedded Redis demands the same."""
        return self.secrets[SUPERVISOR_PASSWORD]

    @property
    def variables(self) -> dict[str, str]:
        """The variables that give its processes their settings, secrets included."""
        return {**self.environment, **{name: text for name, text in self.secrets.items() if name.startswith("ERRATA_")}}


class Home:
    """The folder of one stack; its path is absolute."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def record(self) -> StackRecord | None:
        """What is kept of the stack that was started last; None if it was stopped in order, or there was none."""
        try:
            public: dict[str, Any] = json.loads((self.folder / _RECORD).read_text())
            kept: dict[str, str] = json.loads((self.folder / _SECRETS).read_text())
        except FileNotFoundError:
            return None
        return StackRecord(**public, secrets=kept)

    def write(self, record: StackRecord) -> None:
        """Keeps the record of a stack, in files that only their owner reads; the secrets in one of their own."""
        public = {
            "url": record.url,
            "supervisor_port": record.supervisor_port,
            "environment": dict(record.environment),
        }
        for name, content in ((_RECORD, public), (_SECRETS, dict(record.secrets))):
            path = self.folder / name
            path.touch(mode=0o600)
            path.write_text(json.dumps(content, indent=2))

    def forget(self) -> None:
        """Removes the record of a stack that has ended; its secrets are kept for the next."""
        (self.folder / _RECORD).unlink(missing_ok=True)

    def secrets(self) -> dict[str, str]:
        """The secrets that are kept; empty before the first start."""
        path = self.folder / _SECRETS
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def secrets_for(self, settings: Settings, redis_port: int) -> dict[str, str]:
        """The secrets of a stack that is to be started with these settings; nothing is written.

        Passwords that the settings do not give are made once and kept; the embedded Redis has another port each time.
        """
        made = self.secrets()
        password = made.get(SUPERVISOR_PASSWORD) or secrets.token_hex(24)
        token = settings.node_token.get_secret_value() or made.get("ERRATA_NODE_TOKEN") or secrets.token_hex(24)
        return {
            SUPERVISOR_PASSWORD: password,
            "ERRATA_API_KEY": settings.api_key.get_secret_value(),
            "ERRATA_NODE_TOKEN": token,
            "ERRATA_REDIS_URL": settings.redis_url or f"redis://:{password}@127.0.0.1:{redis_port}/0",
        }

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Held by whoever starts the stack, until it is ready; a second start waits for the first."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def is_being_started(self) -> bool:
        """Whether another process holds ``starting`` now. Its supervisord may not listen yet."""
        try:
            with (self.folder / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False
