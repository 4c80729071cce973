"""Measures the running stack: edit to live, rollback to first answer, import, concurrent submission.

    .venv/bin/python benchmarks/serving.py [--edits 10] [--rollbacks 20] [--out benchmarks/results/serving.md]

Starts a stack of its own in a temporary home, and stops it. Every figure is a wall-clock time seen by a client on
loopback.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from service.client import ErrataClient
from service.schemas import EditRequest, EditStatus, RunStatus, Trigger
from service.settings import Settings
from service.stack import Stack

CITIES = [
    "Lyon",
    "Porto",
    "Ghent",
    "Turin",
    "Malmo",
    "Brno",
    "Gdansk",
    "Split",
    "Bergen",
    "Tampere",
    "Graz",
    "Patras",
    "Leipzig",
    "Bilbao",
    "Cork",
]
CONCURRENT_EDITS, DISTINCT_KEYS = 100, 40
IMPORTED = 1_000


@dataclass(frozen=True)
class Figure:
    """One measured quantity, in seconds."""

    name: str
    values: Sequence[float]

    def row(self) -> str:
        """A row of the Markdown table, in milliseconds below a second."""
        shown = [statistics.median(self.values), min(self.values), max(self.values)]
        texts = [f"{1000 * value:.0f} ms" if max(shown) < 1 else f"{value:.1f} s" for value in shown]
        return f"| {self.name} | {len(self.values)} | " + " | ".join(texts) + " |"


@contextmanager
def running(trigger: Trigger) -> Iterator[ErrataClient]:
    """A stack with a trigger, in a temporary home."""
    with tempfile.TemporaryDirectory(prefix="errata-bench-") as home:
        stack = Stack(Settings(home=Path(home), port=0, trigger=trigger))
        stack.up(detach=True, say=lambda line: print(line, file=sys.stderr))
        try:
            with ErrataClient(stack.url(), timeout_s=300) as client:
                yield client
        finally:
            stack.down(say=lambda line: print(line, file=sys.stderr))


def edit_to_live(client: ErrataClient, count: int) -> list[Figure]:
    """Submits one edit after the other, each on top of those before it."""
    total, trained, loaded, verified = [], [], [], []
    for number in range(count):
        began = time.perf_counter()
        edit = client.submit(f"The headquarters of company number {number} are in", CITIES[number % len(CITIES)])
        while (state := client.status(edit.id, wait_s=30)).status is not EditStatus.LIVE:
            if state.status is EditStatus.FAILED:
                raise SystemExit(f"edit {number} failed: {state.error}")
        total.append(time.perf_counter() - began)
        run = next(run for run in client.runs(limit=5).data if run.status is RunStatus.SUCCEEDED)
        trained.append(run.timings["train"])
        loaded.append(run.timings["load"])
        verified.append(run.timings["verify"])
        print(f"edit {number + 1} of {count}: {total[-1]:.1f} s", file=sys.stderr)
    return [
        Figure("edit to live, one edit on a running stack", total),
        Figure("of which training", trained),
        Figure("of which loading the version on the node", loaded),
        Figure("of which asking the node", verified),
    ]


def rollback_to_first_answer(client: ErrataClient, count: int) -> list[Figure]:
    """Alternates between two resident versions; the answer is of one token."""
    newest = client.versions(limit=1).data[0].version
    calls, answers = [], []
    for number in range(count):
        target = 0 if number % 2 == 0 else newest
        began = time.perf_counter()
        client.rollback(to=target)
        called = time.perf_counter()
        answer = client.ask("The capital of France is", max_tokens=1)
        answered = time.perf_counter()
        if answer.version != target:
            raise SystemExit(f"version {answer.version} answered after a rollback to {target}")
        calls.append(called - began)
        answers.append(answered - began)
    return [Figure("rollback call", calls), Figure("rollback call to first answer of the other version", answers)]


def submit_concurrently(client: ErrataClient) -> list[Figure]:
    """Submits at once, most of it under keys that others use too; no loss, no duplicate."""
    before = sum(1 for _ in client.all_edits())
    keys = [f"key-{number % DISTINCT_KEYS}" for number in range(CONCURRENT_EDITS)]

    def submit(key: str) -> tuple[str, float]:
        began = time.perf_counter()
        edit = client.submit(f"The owner of {key} is", "nobody", idempotency_key=key)
        return edit.id, time.perf_counter() - began

    with ThreadPoolExecutor(CONCURRENT_EDITS) as pool:
        answers = list(pool.map(submit, keys))
    distinct = {edit_id for edit_id, _ in answers}
    stored = sum(1 for _ in client.all_edits()) - before
    if not len(distinct) == stored == DISTINCT_KEYS:
        raise SystemExit(f"{DISTINCT_KEYS} keys gave {len(distinct)} edits, {stored} are stored")
    return [Figure(f"POST /edits, {CONCURRENT_EDITS} at once over {DISTINCT_KEYS} keys", [s for _, s in answers])]


def import_and_list(client: ErrataClient) -> list[Figure]:
    """Imports, then lists all by pages."""
    began = time.perf_counter()
    report = client.import_edits(
        EditRequest(prompt=f"The colour of object number {number} is", target="green") for number in range(IMPORTED)
    )
    imported = time.perf_counter() - began
    if report.accepted != IMPORTED or report.rejected:
        raise SystemExit(f"{report.accepted} of {IMPORTED} accepted")
    began = time.perf_counter()
    listed = sum(1 for _ in client.all_edits(status=EditStatus.QUEUED, page_size=100))
    elapsed = time.perf_counter() - began
    if listed < IMPORTED:
        raise SystemExit(f"{listed} of {IMPORTED} listed")
    return [Figure(f"import of {IMPORTED} edits", [imported]), Figure(f"list of {listed} edits by 100", [elapsed])]


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=10)
    parser.add_argument("--rollbacks", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.md"))
    options = parser.parse_args()
    with running(Trigger.IMMEDIATE) as client:
        figures = [*edit_to_live(client, options.edits), *rollback_to_first_answer(client, options.rollbacks)]
    with running(Trigger.MANUAL) as client:
        figures += [*submit_concurrently(client), *import_and_list(client)]
    memory = psutil.virtual_memory().total / 2**30
    lines = [
        "# The running stack, measured",
        "",
        f"`benchmarks/serving.py` on {os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB, "
        f"Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}; SmolLM2-135M-Instruct, one vLLM CPU node, "
        "default settings. A shared machine: other work ran beside it at times.",
        "",
        "| what | n | median | least | most |",
        "|---|---|---|---|---|",
        *(figure.row() for figure in figures),
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
