"""Measures the running stack: one edit to live, each on top of those before it, and a rollback to its first answer.

    .venv/bin/python -m benchmarks.serving [--edits 10] [--rollbacks 20]

Starts a stack of its own in a temporary home, and stops it.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.load import running, say
from benchmarks.report import RESULTS, Results, spread, told
from service.client import ErrataClient
from service.schemas import EditStatus, RunStatus, Trigger

CITIES = ("Lyon", "Porto", "Ghent", "Turin", "Malmo", "Brno", "Gdansk", "Split", "Bergen", "Tampere", "Graz", "Patras")
PHASES = {
    "of which training": "train",
    "of which loading the version on the node": "load",
    "of which asking the node": "verify",
}

Seconds = dict[str, list[float]]


def main() -> None:
    """Measure and write the table."""
    options = _parser().parse_args()
    results = Results(
        options.out,
        "The running stack",
        f"`benchmarks/serving.py`: {told(options)}. The default model on one vLLM CPU node, default settings, a run "
        "for every edit. Clock times as a client on loopback sees them: medians, with least and most in brackets.",
    )
    results.table(("what", "times", "ms"))
    with (
        running("serving", trigger=Trigger.IMMEDIATE) as stack,
        ErrataClient(stack.url(), timeout_s=300) as client,
    ):
        for found in (edit_to_live(client, options.edits), rollback_to_first_answer(client, options.rollbacks)):
            for row in _rows(found):
                results.add(row)


def edit_to_live(client: ErrataClient, count: int) -> Seconds:
    """Submits one edit after the other, each when the one before it is live."""
    found: Seconds = {"one edit to live": [], **{what: [] for what in PHASES}}
    for number in range(count):
        began = time.perf_counter()
        edit = client.submit(f"The headquarters of company number {number} are in", CITIES[number % len(CITIES)])
        while (state := client.status(edit.id, wait_s=30)).status is not EditStatus.LIVE:
            if state.status is EditStatus.FAILED:
                raise SystemExit(f"edit {number} failed: {state.error}")
        found["one edit to live"].append(time.perf_counter() - began)
        run = next(run for run in client.runs(limit=5).data if run.status is RunStatus.SUCCEEDED)
        for what, phase in PHASES.items():
            found[what].append(run.timings[phase])
        say(f"edit {number + 1} of {count}: {found['one edit to live'][-1]:.1f} s")
    return found


def rollback_to_first_answer(client: ErrataClient, count: int) -> Seconds:
    """Alternates between two resident versions; the answer is of one token."""
    newest = client.versions(limit=1).data[0].version
    found: Seconds = {"rollback call": [], "rollback call to the first answer of the other version": []}
    calls, answers = found.values()
    for number in range(count):
        target = newest if number % 2 else 0
        began = time.perf_counter()
        client.rollback(to=target)
        calls.append(time.perf_counter() - began)
        answer = client.ask("The capital of France is", max_tokens=1)
        answers.append(time.perf_counter() - began)
        if answer.version != target:
            raise SystemExit(f"version {answer.version} answered after a rollback to {target}")
    return found


def _rows(found: Seconds) -> Iterator[Sequence[object]]:
    for what, seconds in found.items():
        yield what, len(seconds), spread([1000 * value for value in seconds])


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    options.add_argument("--edits", type=int, default=10, help="edits, one after the other")
    options.add_argument("--rollbacks", type=int, default=20, help="rollbacks, to and fro")
    options.add_argument("--out", type=Path, default=RESULTS / "serving.md", help="where the results go")
    return options


if __name__ == "__main__":
    main()
