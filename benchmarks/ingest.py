"""Measures how fast edits come in and are found again: import, single POSTs, listing and status among many.

    .venv/bin/python -m benchmarks.ingest [--imported 10000] [--posts 5000] [--stored 100000] [--repeats 5]

Starts a Redis, a service and a control worker of its own in a temporary home, as `errata up` starts them but with no
node and no trainer, and stops them. Times are seen by a client on loopback, which shares the cores with them.
"""

import argparse
import itertools
import json
import secrets
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, cast

import httpx
from redis import Redis

from benchmarks.load import percentile, say
from benchmarks.report import RESULTS, Results, spread, told
from service import programs
from service.client import ErrataClient
from service.ports import free_port
from service.schemas import EditRequest, EditStatus
from service.settings import Settings
from service.stack import default_model
from service.supervisor import Supervisor

_START_S = 120
_NOBODY = "http://127.0.0.1:1"


def main() -> None:
    """Measure everything on one set of processes and write the table."""
    options = _parser().parse_args()
    results = Results(
        options.out,
        "How fast edits come in and are found",
        f"`benchmarks/ingest.py`: {told(options)}. Medians of the repetitions, with least and most in brackets. Redis "
        "writes every command to disk before it answers; a POST is answered after that.",
    )
    results.table(["what", "figure"])
    with _running() as settings:
        for name, figure in _figures(options, settings):
            results.add([name, figure])


def _figures(options: argparse.Namespace, settings: Settings) -> Iterator[tuple[str, object]]:
    url, repeats = f"http://127.0.0.1:{settings.port}", range(options.repeats)
    with ErrataClient(url, timeout_s=600) as client:
        seconds = [_import(client, f"import {repeat}", options.imported) for repeat in repeats]
        yield f"import of {options.imported} edits, s", spread(seconds)
        loads = [_posts(settings.port, f"post {repeat}", options) for repeat in repeats]
        yield f"single POSTs a second, {options.concurrency} at a time", spread([rate for rate, _ in loads])
        yield "p99 of such a POST, ms", spread([1000 * percentile(times, 99) for _, times in loads])
        _import(client, "stored", options.stored - options.repeats * (options.imported + options.posts))
        with Redis.from_url(settings.redis_url) as redis:
            memory = int(cast(dict[str, Any], redis.info("memory"))["used_memory"])
        yield "edits stored", options.stored
        yield "memory of Redis, MiB", memory / 2**20
        yield "of it bytes an edit, events and audit log included", memory / options.stored
        newest = client.edits(limit=1).data[0].id
        paths = {
            "listing of 100": "/edits?limit=100",
            "listing of 100 by status": f"/edits?status={EditStatus.QUEUED}&limit=100",
            "status": f"/edits/{newest}/status",
        }
        for name, path in paths.items():
            times = [_gets(url + path, options.gets) for _ in repeats]
            for percent in (50, 99):
                yield f"{name}, p{percent} ms", spread([1000 * percentile(found, percent) for found in times])


def _import(client: ErrataClient, name: str, count: int) -> float:
    began = time.perf_counter()
    report = client.import_edits(
        EditRequest(prompt=f"The colour of object {number} of {name} is", target="green") for number in range(count)
    )
    if report.accepted != count:
        raise SystemExit(f"{report.accepted} of {count} accepted: {report.errors[:3]}")
    return time.perf_counter() - began


def _posts(port: int, name: str, options: argparse.Namespace) -> tuple[float, list[float]]:
    """POSTs a second, and the seconds of each; by the standard library, whose client takes the least of the cores."""
    numbers = iter(range(options.posts))

    def client(_: int) -> list[float]:
        times = []
        with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as http:
            for number in numbers:
                body = {"prompt": f"The weight of object {number} of {name} is", "target": "one ton"}
                began = time.perf_counter()
                http.request("POST", "/edits", json.dumps(body), {"content-type": "application/json"})
                with http.getresponse() as answer:
                    answer.read()
                if answer.status != 202:
                    raise SystemExit(f"{answer.status} {answer.reason}")
                times.append(time.perf_counter() - began)
        return times

    began = time.perf_counter()
    with ThreadPoolExecutor(options.concurrency) as pool:
        times = list(itertools.chain.from_iterable(pool.map(client, range(options.concurrency))))
    return len(times) / (time.perf_counter() - began), times


def _gets(url: str, count: int) -> list[float]:
    times = []
    with httpx.Client(timeout=60) as http:
        for _ in range(count):
            began = time.perf_counter()
            http.get(url).raise_for_status()
            times.append(time.perf_counter() - began)
    return times


@contextmanager
def _running() -> Iterator[Settings]:
    password, redis_port = secrets.token_hex(24), free_port()
    with tempfile.TemporaryDirectory(prefix="errata-ingest-") as home:
        settings = Settings(
            home=Path(home),
            port=free_port(),
            model=str(default_model(say)),
            redis_url=f"redis://:{password}@127.0.0.1:{redis_port}/0",
            nodes=(_NOBODY,),
            queue_max_edits=10_000_000,
        )
        _, control = programs.workers(settings)
        started = [programs.redis(Path(home, "redis"), redis_port, password), control, programs.service()]
        supervisor = Supervisor(Path(home), free_port(), password)
        process = supervisor.start(started, {**settings.environment(), "ERRATA_REDIS_URL": settings.redis_url})
        try:
            _wait(f"http://127.0.0.1:{settings.port}/edits")
            yield settings
        finally:
            process.terminate()
            process.wait(60)


def _wait(url: str) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            return httpx.get(url).raise_for_status().close()
        except httpx.HTTPError as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"the service did not start: {error}") from error
            time.sleep(0.5)


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.ingest")
    options.add_argument("--imported", type=int, default=10_000, help="edits of one import")
    options.add_argument("--posts", type=int, default=5000, help="single POSTs of a repetition")
    options.add_argument("--concurrency", type=int, default=16, help="POSTs at a time")
    options.add_argument("--stored", type=int, default=100_000, help="edits that listing and status are measured among")
    options.add_argument("--gets", type=int, default=500, help="listings and statuses of a repetition")
    options.add_argument("--repeats", type=int, default=5, help="repetitions")
    options.add_argument("--out", type=Path, default=RESULTS / "ingest.md", help="where the results go")
    return options


if __name__ == "__main__":
    main()
