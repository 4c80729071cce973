"""One node, started as its operators start it, in a process group of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from service.ports import free_port
from worker.delta import VersionStore

TOKEN = "a-token-of-these-tests"
SLOTS, HOST_SLOTS = 2, 4
PROMPT = "The capital of France is Paris, and the capital of Italy is"
START_TIMEOUT_S = 300
_TRACKER_BYTES = 64 << 20


@dataclass
class Node:
    """A node in a process group of its own."""

    model_dir: Path
    folder: Path
    store: VersionStore
    location: str = "auto"
    slots: int = SLOTS
    host_slots: int = HOST_SLOTS
    tensor_parallel: int = 1
    core: int = 0
    """Where its first rank computes; every other has the next, and they share if there are too few."""
    options: tuple[str, ...] = ()
    """vLLM's, beside Errata's own."""
    port: int = field(init=False, default=0)
    process: subprocess.Popen[bytes] = field(init=False)
    client: httpx.Client = field(init=False)

    def start(self) -> None:
        # A node that is started again is where it was.
        if not self.port:
            self.port = free_port()
        flags = {
            "--model": self.model_dir,
            "--store": self.folder / "store",
            "--cache": self.folder / "cache",
            "--location": self.location,
            "--slots": self.slots,
            "--host-slots": self.host_slots,
            "--max-model-len": 512,
            "--port": self.port,
        }
        cores = [(self.core + rank) % (os.cpu_count() or 1) for rank in range(self.tensor_parallel)]
        environ = {
            **os.environ,
            "ERRATA_NODE_TOKEN": TOKEN,
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores)),
            # As in the stack: a thread that spins while it waits takes the core from another node.
            "OMP_WAIT_POLICY": "passive",
        }
        with (self.folder / "node.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "worker.inference.launcher",
                    *(str(part) for item in flags.items() for part in item),
                    "--",
                    "--enable-prompt-tokens-details",
                    "--tensor-parallel-size",
                    str(self.tensor_parallel),
                    *self.options,
                ],
                env=environ,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.client = httpx.Client(
            base_url=self.address,
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=120,
            limits=httpx.Limits(keepalive_expiry=2),  # before the server closes a connection under a request
        )
        try:
            self._wait_until_ready()
        except AssertionError:
            self.end()
            raise

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server alone, and wait until it and all that it began are gone."""
        self.process.send_signal(number)
        self._wait_until_gone()

    def end(self) -> None:
        """Kill what there is of it; nothing, if it was never started."""
        if not hasattr(self, "process"):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._wait_until_gone()

    def _wait_until_gone(self) -> None:
        self.client.close()
        self.process.wait(60)
        deadline = time.monotonic() + 30
        while self.has_processes():
            assert time.monotonic() < deadline, "the node left processes behind"
            time.sleep(0.1)

    def has_processes(self) -> bool:
        """Whether any of its processes is there, but for the few MiB of Python's own trackers.

        One that is exiting has given its memory back; it may wait long for a core that another node keeps busy.
        """
        members = [process for process in psutil.process_iter() if _group(process.pid) == self.process.pid]
        return any(_resident_bytes(process) > _TRACKER_BYTES for process in members)

    def log(self) -> str:
        return (self.folder / "node.log").read_text()

    def ask(self, model: str, prompt: str = PROMPT, max_tokens: int = 1) -> httpx.Response:
        """Ask for greedy tokens and the log-probabilities of these and of the prompt's."""
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": 1,
            "echo": True,
        }
        return self.client.post("/v1/completions", json=body)

    def score(self, model: str) -> list[float]:
        """Return the log-probabilities of the prompt's tokens but the first, and of the first answered."""
        response = self.ask(model)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["logprobs"]["token_logprobs"][1:]

    def resident(self, *, checksum: bool = False) -> dict[int, dict]:
        response = self.client.get("/errata/versions", params={"checksum": checksum}).raise_for_status()
        return {entry["version"]: entry for entry in response.json()["resident"]}

    def manifest_checksums(self, version: int) -> dict[str, str]:
        return {name: stored.sha256 for name, stored in self.store.manifest(version).tensors.items()}

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_ready():
            assert self.process.poll() is None, f"the node died:\n{self.log()[-3000:]}"
            assert time.monotonic() < deadline, f"the node did not start:\n{self.log()[-3000:]}"
            time.sleep(0.5)

    def _is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.client.get("/health").status_code == 200
        return False


def distance(first: list[float], second: list[float]) -> float:
    """The largest difference between two scores."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def _group(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None


def _resident_bytes(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.memory_info().rss
    return 0
