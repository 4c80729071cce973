"""Measures what spinning OpenMP threads cost when two processes share the cores, as trainer and node do.

    .venv/bin/python -m benchmarks.contention MODEL [--out benchmarks/results/contention.md]

Trains the demo's 20 edits for 8 epochs, alone and twice at once, with each wait policy. Runs as its own child too.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from service.demo.script import facts

EPOCHS = 8
POLICIES = ("active", "passive")


def train_once(model: str) -> None:
    """Prints the seconds that training took; torch reads the wait policy when it is imported."""
    from worker.model import load_base  # noqa: PLC0415
    from worker.training.breadth_first import TrainingConfig, train  # noqa: PLC0415
    from worker.training.encode import TrainingEdit  # noqa: PLC0415
    from worker.training.prefix import PrefixCache  # noqa: PLC0415

    edits = [TrainingEdit(str(number), fact.prompt, fact.target) for number, fact in enumerate(facts())]
    config = TrainingConfig(max_epochs=EPOCHS, min_steps=1)
    print(train(load_base(model), edits, config, prefix=PrefixCache()).train_s)


def measured(model: str, policy: str, processes: int) -> list[float]:
    """Seconds of each of so many processes at once."""
    command = [sys.executable, "-m", "benchmarks.contention", model, "--child"]
    environment = {**os.environ, "OMP_WAIT_POLICY": policy}
    children = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(processes)
    ]
    return [float(child.communicate()[0]) for child in children]


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/contention.md"))
    options = parser.parse_args()
    if options.child:
        train_once(options.model)
        return
    lines = [
        "# Spinning and waiting threads",
        "",
        f"`benchmarks/contention.py`: 20 edits, {EPOCHS} epochs, {options.repeats} repetitions, {os.cpu_count()} cores "
        f"({platform.machine()}), {time.strftime('%Y-%m-%d')}. Seconds of each process, least to most.",
        "",
        "| OMP_WAIT_POLICY | alone | two at once |",
        "|---|---|---|",
    ]
    for policy in POLICIES:
        cells = []
        for processes in (1, 2):
            values = sorted(
                value for _ in range(options.repeats) for value in measured(options.model, policy, processes)
            )
            cells.append(", ".join(f"{value:.1f}" for value in values))
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
