"""A stack as a user has it: started, asked and stopped by the command line."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.settings import Settings
from service.stack import Stack

_UP_TIMEOUT_S = 800

# What the trainer computes of the model once ever, which takes minutes: from the first home with the usual settings.
_COMPUTED_ONCE = Path(tempfile.mkdtemp(prefix="errata-e2e-")) / "prefix"
atexit.register(shutil.rmtree, _COMPUTED_ONCE.parent, ignore_errors=True)


@dataclass(frozen=True)
class RunningStack:
    """A stack and how to reach it."""

    home: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    """Variables of the environment that it is started with."""

    def errata(self, *words: str, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
        """Runs the command line against this home."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ERRATA_")}
        return subprocess.run(
            [str(Path(sys.executable).with_name("errata")), *words],
            env={**environment, "ERRATA_HOME": str(self.home), "ERRATA_PORT": "0", **self.settings},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def up(self) -> None:
        own = self.home / "prefix"
        if _COMPUTED_ONCE.exists() and not own.exists():
            shutil.copytree(_COMPUTED_ONCE, own)
        done = self.errata("up", "--detach", timeout_s=_UP_TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        if not self.settings and not _COMPUTED_ONCE.exists():
            shutil.copytree(own, _COMPUTED_ONCE)

    def down(self) -> None:
        done = self.errata("down")
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def stack(self) -> Stack:
        return Stack(Settings(home=self.home))

    @property
    def url(self) -> str:
        return self.stack.url()

    def pid(self, name: str) -> int:
        """Process id of one of the stack's processes."""
        return next(process.pid for process in self.stack.processes() if process.name == name)


def until(condition: Callable[[], bool], *, within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.25)
