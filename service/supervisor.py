"""supervisord for the embedded stack: its configuration, and the few calls made to it (http://supervisord.org)."""

import os
import subprocess
import sys
import xmlrpc.client
from collections.abc import Mapping, Sequence
from configparser import RawConfigParser
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast

import psutil

_STOP_WAIT_S = 30
# Programs of one priority stop together, and one priority behind the other.
_SHUT_DOWN_WAIT_S = 5 * _STOP_WAIT_S
_LOG_BYTES = 16 * 1024**2
_PID_FILE = "supervisord.pid"


@dataclass(frozen=True)
class Program:
    """One process to keep running; a lower priority starts earlier and stops later.

    Attributes:
        withheld: variables of the common environment that it has no use for: secrets of others.
    """

    name: str
    command: Sequence[str]
    priority: int
    withheld: Sequence[str] = ()


@dataclass(frozen=True)
class Process:
    """A process as supervisord reports it; ``state`` is RUNNING, STARTING, BACKOFF, FATAL, STOPPED … (its names)."""

    name: str
    state: str
    pid: int
    uptime_s: int
    description: str


@dataclass(frozen=True)
class Supervisor:
    """One supervisord, reached on a loopback port with a password."""

    folder: Path
    port: int
    password: str

    def _call(self, method: str) -> Any:
        with xmlrpc.client.ServerProxy(f"http://errata:{self.password}@127.0.0.1:{self.port}/RPC2") as server:
            return getattr(server.supervisor, method)()

    def log_file(self, name: str) -> Path:
        """Where a process writes."""
        return self.folder / "logs" / f"{name}.log"

    def start(self, programs: Sequence[Program], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """Starts supervisord with these programs; the secrets are in the environment, never in a command line."""
        self.log_file("").parent.mkdir(parents=True, exist_ok=True)
        config = self.folder / "supervisord.conf"
        config.touch(mode=0o600)
        with config.open("w") as file:
            self._configuration(programs).write(file)
        with self.log_file("supervisord").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "supervisor.supervisord", "--nodaemon", "--configuration", str(config)],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for whoever started the stack, who then stops it in order.
                start_new_session=True,
            )

    def processes(self) -> list[Process]:
        """The processes, or none if supervisord is not there."""
        try:
            rows = cast(list[dict[str, Any]], self._call("getAllProcessInfo"))
        except (OSError, HTTPException, xmlrpc.client.Error):
            return []
        return [
            Process(
                name=row["name"],
                state=row["statename"],
                pid=row["pid"],
                uptime_s=max(0, row["now"] - row["start"]) if row["pid"] else 0,
                description=row["description"],
            )
            for row in rows
        ]

    def shut_down(self) -> bool:
        """Stops all processes, then supervisord, and waits for its end; returns False if it was not there.

        Raises:
            TimeoutError: it is still there after the time that its processes have to stop.
        """
        try:
            supervisord = psutil.Process(self._call("getPID"))
            self._call("shutdown")
        except (OSError, HTTPException, xmlrpc.client.Error, psutil.NoSuchProcess):
            return False
        try:
            supervisord.wait(_SHUT_DOWN_WAIT_S)
        except psutil.TimeoutExpired as error:
            raise TimeoutError(f"supervisord, process {supervisord.pid}, is still there") from error
        return True

    def _configuration(self, programs: Sequence[Program]) -> RawConfigParser:
        parser = RawConfigParser()
        parser["supervisord"] = {
            "logfile": "/dev/null",
            "logfile_maxbytes": "0",
            "pidfile": str(self.folder / _PID_FILE),
            "nodaemon": "true",
            "silent": "true",
        }
        parser["inet_http_server"] = {
            "port": f"127.0.0.1:{self.port}",
            "username": "errata",
            "password": self.password,
        }
        parser["rpcinterface:supervisor"] = {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        }
        for program in programs:
            parser[f"program:{program.name}"] = {
                "command": " ".join(_quoted(word) for word in program.command),
                "environment": ",".join(f'{name}=""' for name in program.withheld),
                "priority": str(program.priority),
                "autorestart": "true",
                "startsecs": "2",
                "startretries": "1000",
                "stopwaitsecs": str(_STOP_WAIT_S),
                "stopasgroup": "true",
                "killasgroup": "true",
                "redirect_stderr": "true",
                "stdout_logfile": str(self.log_file(program.name)),
                "stdout_logfile_maxbytes": str(_LOG_BYTES),
                "stdout_logfile_backups": "3",
            }
        return parser


def left_behind(folder: Path) -> list[psutil.Process]:
    """The processes of a supervisord that was killed, or does not answer: those of its session.

    A session's number is no other's as long as one of its processes lives. That it has not become another's since is
    known by those whose environment names the folder as their home; Redis and celery write their titles over theirs.
    """
    try:
        session = int((folder / _PID_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return []
    if session == os.getsid(0):  # who asks was started by nobody's supervisord
        return []
    found = [process for process in psutil.process_iter(["name", "environ"]) if _session(process.pid) == session]
    homes = {(process.info["environ"] or {}).get("ERRATA_HOME") for process in found}
    return found if str(folder) in homes else []


def end(left: Sequence[psutil.Process]) -> None:
    """Stops what is left behind: Redis last, because the others write to it until they end.

    Raises:
        TimeoutError: something is still there although it was killed.
    """
    redis = [process for process in left if process.info["name"] == "redis-server"]
    for processes in ([process for process in left if process not in redis], redis):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, stubborn = psutil.wait_procs(processes, _STOP_WAIT_S)
        for process in stubborn:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if there := psutil.wait_procs(stubborn, _STOP_WAIT_S)[1]:
            raise TimeoutError(f"still there: {', '.join(f'process {process.pid}' for process in there)}")


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _quoted(word: str) -> str:
    # supervisord expands % and splits as a shell does.
    escaped = word.replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
