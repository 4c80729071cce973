"""Measures what spinning OpenMP threads cost when two processes share the cores, as trainer and node do.

    .venv/bin/python -m benchmarks.contention --model FOLDER [--repeats 3]

Trains the demo's 20 edits for 8 epochs, every batch with its step, alone and twice at once, with each wait policy. Runs
as its own child too.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.bench import demo_edits, every_step
from benchmarks.report import RESULTS, Results, progress, spread, told
from worker.model import load_base
from worker.training.breadth_first import train
from worker.training.prefix import PrefixCache
from worker.workbench import training_edit

EPOCHS = 8
POLICIES = ("active", "passive")


def train_once(model: Path, epochs: int) -> float:
    """The seconds that training took."""
    edits = [training_edit(row) for row in demo_edits()]
    return train(load_base(str(model)), edits, every_step(epochs), prefix=PrefixCache()).train_s


def measured(model: Path, policy: str, processes: int) -> list[float]:
    """Seconds of each of so many processes at once; torch reads the wait policy when it is imported."""
    command = [sys.executable, "-m", "benchmarks.contention", "--model", str(model), "--child"]
    environment = {**os.environ, "OMP_WAIT_POLICY": policy}
    children = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(processes)
    ]
    return [float(child.communicate()[0]) for child in children]


def main() -> None:
    """Measure every policy and write the table; or, as a child, train once."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contention")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--repeats", type=int, default=3, help="times that each is measured")
    parser.add_argument("--out", type=Path, default=RESULTS / "contention.md", help="where the results go")
    parser.add_argument("--child", action="store_true", help="train once and print the seconds; for the script itself")
    options = parser.parse_args()
    if options.child:
        print(train_once(options.model, EPOCHS))
        return
    results = Results(
        options.out,
        "Spinning and waiting threads",
        f"`benchmarks/contention.py`: {told(options)}; 20 edits, {EPOCHS} epochs. Seconds of each process, medians "
        "with least and most in brackets.",
    )
    results.table(["OMP_WAIT_POLICY", "alone", "two at once"])
    with progress() as shown:
        task = shown.add_task("runs", total=len(POLICIES) * 2 * options.repeats)
        for policy in POLICIES:
            cells = []
            for processes in (1, 2):
                seconds: list[float] = []
                for _ in range(options.repeats):
                    seconds += measured(options.model, policy, processes)
                    shown.advance(task)
                cells.append(spread(seconds))
            results.add([policy, *cells])


if __name__ == "__main__":
    main()
