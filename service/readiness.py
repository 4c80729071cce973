"""Waits for a stack that was just started, and says early why it will not come up."""

import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import httpx

from service.errors import ErrataError
from service.schemas import Health
from service.supervisor import Supervisor

_READY_WITHIN_S = 600.0
_LOOK_EVERY_S = 0.5
# The supervisor goes on restarting for as long as it runs; a stack that is being started gives up sooner.
_MOST_STARTS = 3
_ENDING_LINES = 10


class NotReadyError(ErrataError):
    """The stack does not come up."""

    default_code = "not_ready"


def wait_until_ready(
    url: str, supervisor: Supervisor, process: "subprocess.Popen[bytes]", say: Callable[[str], None]
) -> None:
    """Returns once ``/health/ready`` answers 200.

    Raises:
        NotReadyError: a process dies again and again, the supervisor ended, or it takes too long.
    """
    with httpx.Client(base_url=url, timeout=5) as http:
        _wait(http, supervisor, process, say)


def _wait(
    http: httpx.Client, supervisor: Supervisor, process: "subprocess.Popen[bytes]", say: Callable[[str], None]
) -> None:
    began = time.monotonic()
    told = ""
    pids: dict[str, set[int]] = defaultdict(set)
    while (waited_s := time.monotonic() - began) < _READY_WITHIN_S:
        if process.poll() is not None:
            raise NotReadyError(f"the supervisor ended: {_last_words(supervisor.log_file('supervisord'))}")
        for found in supervisor.processes():
            pids[found.name] |= {found.pid} - {0}
            if len(pids[found.name]) > _MOST_STARTS:
                raise NotReadyError(f"{found.name} does not start: {_last_words(supervisor.log_file(found.name))}")
        missing = _missing(http)
        if not missing:
            return
        if missing != told:
            told = missing
            say(f"{waited_s:5.0f} s  waiting for {missing}")
        time.sleep(_LOOK_EVERY_S)
    raise NotReadyError(f"not ready after {_READY_WITHIN_S:.0f} s, still waiting for {told}; `errata logs` has more")


def _missing(http: httpx.Client) -> str:
    """What is not ready yet, in words; empty if all is."""
    try:
        health = Health.model_validate_json(http.get("/health/ready").content)
    except (httpx.HTTPError, ValueError):
        return "the service"
    return ", ".join(name.replace("_", " ") for name, check in health.checks.items() if not check.ok)


def _last_words(path: Path) -> str:
    """What a process said last, and rather what went wrong than how it then ended in order."""
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    said = [line.strip() for line in lines if line.strip()][-_ENDING_LINES:]
    wrong = [line for line in said if '"level": "info"' not in line]
    return f"{(wrong or said or ['nothing was logged'])[-1][:500]} ({path})"
