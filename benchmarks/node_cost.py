"""Measures what resident versions cost a node: Errata's node beside a plain vLLM, on a CPU.

    .venv/bin/python -m benchmarks.node_cost --model FOLDER [--versions 3] [--repeats 5]

Both servers are up at once and are asked in turn, in every other repetition the other way round, so that a
repetition's ratio is of neighbours in time. Prompts differ in their first token, so no prefix is cached; every answer
has the same length. Versions are the base's matrix with noise: what a matrix holds costs nothing.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch

from benchmarks.load import Load, ask, say
from benchmarks.report import RESULTS, Results, spread, told
from service.model_names import version_name
from service.nodes import authorization
from service.ports import free_port
from worker.delta import VersionStore
from worker.inference.launcher import BASE_MODEL_NAME, precision_flags
from worker.model import load_base
from worker.records import version_info

TOKEN = "benchmark"
MAX_MODEL_LEN = "512"
_START_S = 300
_PROMPT = " ".join(["The history of the city begins with a market at the ford of a river."] * 4)


@dataclass(frozen=True)
class Server:
    """A running server: its address and its first process."""

    url: str
    process: psutil.Process

    def cpu_s(self) -> float:
        """CPU time that its processes have spent so far."""
        processes = [self.process, *self.process.children(recursive=True)]
        return float(sum(times.user + times.system for times in (process.cpu_times() for process in processes)))


def main() -> None:
    """Start both servers, ask them in turn, write the table."""
    options = _parser().parse_args()
    results = Results(
        options.out,
        "What resident versions cost a node",
        f"`benchmarks/node_cost.py`: {told(options)}. Tokens answered per second, and the ratio to the plain server's "
        f"of the same repetition: medians of {options.repeats}, with least and most in brackets. The CPU time is that "
        "of all the server's processes; the plain server's engine spins while it waits (record 0030). Both servers run "
        "eagerly, as the CPU profile does; the clients share the cores with them.",
    )
    results.table(["at a time", "server", "versions asked", "tokens/s", "of the plain server's", "CPU ms a token"])
    with tempfile.TemporaryDirectory(prefix="errata-node-cost-") as scratch:
        folder = Path(scratch)
        _write_versions(options, folder / "store")
        with plain_vllm(options.model, folder, precision_flags("cpu")) as plain, _node(options, folder) as node:
            for concurrency in options.concurrency:
                for row in _rows(options, concurrency, plain, node):
                    results.add([concurrency, *row])


def _rows(options: argparse.Namespace, concurrency: int, plain: Server, node: Server) -> Iterator[list[object]]:
    names = [version_name(number) for number in range(options.versions)]
    cases = {("plain vLLM", 0): (plain, [BASE_MODEL_NAME])}
    cases |= {("Errata's node", count): (node, names[:count]) for count in sorted({1, options.versions})}
    load = Load(options.rounds * concurrency, concurrency, options.tokens)
    rates: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    cpu_ms: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for repeat in range(options.repeats + 1):
        for case in list(cases) if repeat % 2 else list(cases)[::-1]:
            server, models = cases[case]
            began_s = server.cpu_s()
            rate = options.tokens * ask(server.url, authorization(TOKEN), models, load, prompt=_PROMPT).rate
            spent_s = server.cpu_s() - began_s
            say(f"{repeat} of {options.repeats}, {concurrency} at a time, {case}: {rate:.0f} tokens/s")
            if repeat:  # the first one warms up
                rates[case].append(rate)
                cpu_ms[case].append(1000 * spent_s / (load.requests * options.tokens))
    base = rates["plain vLLM", 0]
    for case, found in rates.items():
        ratios = [a / b for a, b in zip(found, base, strict=True)]
        yield [case[0], case[1] or None, spread(found), spread(ratios), spread(cpu_ms[case])]


def _write_versions(options: argparse.Namespace, folder: Path) -> None:
    base, store = load_base(str(options.model), options.location), VersionStore(str(folder))
    for number in range(options.versions):
        noise = torch.Generator().manual_seed(number)
        tensors = {
            name: tensor + 1e-3 * bool(number) * torch.randn(tensor.shape, generator=noise).to(tensor.dtype)
            for name, tensor in base.tuned_tensors().items()
        }
        store.write(version_info(base, number, parent=None, run={}, metrics={}), tensors, [])


@contextmanager
def plain_vllm(model: Path, folder: Path, flags: Sequence[str]) -> Iterator[Server]:
    """vLLM as the node's launcher starts it, but without the plugin."""
    arguments = ["-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model), "--enforce-eager"]
    arguments += ["--served-model-name", BASE_MODEL_NAME, "--host", "127.0.0.1", "--disable-uvicorn-access-log"]
    arguments += flags
    environ = {"VLLM_PLUGINS": "", "TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with server(arguments, environ, folder / "plain.log") as started:
        yield started


@contextmanager
def _node(options: argparse.Namespace, folder: Path) -> Iterator[Server]:
    arguments = ["-m", "worker.inference.launcher", "--model", str(options.model), "--store", str(folder / "store")]
    arguments += ["--cache", str(folder / "cache"), "--location", options.location]
    with server(arguments, {"ERRATA_NODE_TOKEN": TOKEN}, folder / "node.log") as started:
        yield started


@contextmanager
def server(arguments: Sequence[str], environ: Mapping[str, str], log: Path) -> Iterator[Server]:
    """A server that answers; it ends with the block."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, *arguments, "--max-model-len", MAX_MODEL_LEN, "--port", str(port)],
            env={**os.environ, "OMP_WAIT_POLICY": "passive", "VLLM_NO_USAGE_STATS": "1", **environ},
            stdout=written,
            stderr=written,
        )
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"a server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(1)
        yield Server(url, psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", headers=authorization(TOKEN)).is_success
    except httpx.TransportError:
        return False


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.node_cost")
    options.add_argument("--model", required=True, type=Path, help="folder of the base model")
    options.add_argument("--location", default="auto", help="what versions tune")
    options.add_argument("--versions", type=int, default=3, help="versions that are asked at once in the last row")
    options.add_argument("--rounds", type=int, default=4, help="requests of each client in a repetition")
    options.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 16], help="clients, a request at a time each"
    )
    options.add_argument("--tokens", type=int, default=64, help="tokens of every answer")
    options.add_argument("--repeats", type=int, default=5, help="repetitions, behind one that warms up")
    options.add_argument("--out", type=Path, default=RESULTS / "node_cost.md", help="where the results go")
    return options


if __name__ == "__main__":
    main()
