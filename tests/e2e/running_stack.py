"""A stack as a user has it: started, asked and stopped by the command line."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.settings import Settings
from service.stack import Stack

_UP_TIMEOUT_S = 500


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
        done = self.errata("up", "--detach", timeout_s=_UP_TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr

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
