"""How results are shown: Markdown tables, the machine they were measured on, plots, progress."""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import psutil
import torch
from rich.console import Console
from rich.progress import Progress

from worker.precision import compute_dtype

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("torch", "transformers")


class Machine:
    """What a measurement ran on. Made before it, so that the load can be told from before and after."""

    def __init__(self) -> None:
        self._load_before = os.getloadavg()[0]
        # Now: work goes on in the checkout while a measurement runs.
        self._commit = _commit()

    def line(self) -> str:
        """One paragraph: processor, cores, memory, dtype, how threads wait, libraries, commit, load averages."""
        memory = psutil.virtual_memory().total / 2**30
        libraries = [f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES]
        computed_in = str(compute_dtype(torch.bfloat16, "cpu")).removeprefix("torch.")
        return (
            f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, computes in {computed_in}, "
            f"OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'unset')}; "
            f"Python {platform.python_version()}, {', '.join(libraries)}; commit {self._commit}; "
            f"load average {self._load_before:.1f} before and {os.getloadavg()[0]:.1f} after."
        )


class Results:
    """A results file that is rewritten with every row, so that an interrupted script leaves what it measured.

    Beside it, with the suffix `.jsonl`, are the raw numbers that `record` is given.
    """

    def __init__(self, out: Path, title: str, about: str) -> None:
        """`about` says what was done; the machine is told behind it."""
        self._out = out
        self._raw = out.with_suffix(".jsonl")
        self._machine = Machine()
        self._title, self._about = title, about
        self._blocks: list[str | tuple[Sequence[str], list[Sequence[object]]]] = []
        out.parent.mkdir(parents=True, exist_ok=True)
        self._raw.unlink(missing_ok=True)

    def table(self, columns: Sequence[str]) -> None:
        """Begin a table; rows go to the one that was begun last."""
        self._blocks.append((columns, []))

    def add(self, row: Sequence[object]) -> None:
        """Add a row to the table."""
        _, rows = next(block for block in reversed(self._blocks) if not isinstance(block, str))
        rows.append(row)
        print(_line(row), flush=True)
        self._write()

    def say(self, text: str) -> None:
        """Add a paragraph, or a heading."""
        self._blocks.append(text)
        self._write()

    def record(self, **values: Any) -> None:
        """Append a line of raw numbers."""
        with self._raw.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def plot(self, name: str) -> Path:
        """The path of a plot of these results; it is shown in them."""
        path = self._out.with_name(f"{self._out.stem}-{name}.png")
        self.say(f"![{name}]({path.name})")
        return path

    def _write(self) -> None:
        blocks = [block if isinstance(block, str) else markdown_table(*block) for block in self._blocks]
        parts = [f"# {self._title}", f"{self._about}\n{self._machine.line()}", *blocks]
        self._out.write_text("\n\n".join(parts) + "\n")


def progress() -> Progress:
    """A progress display on stderr, to be entered."""
    return Progress(console=Console(stderr=True), transient=True)


def told(options: argparse.Namespace) -> str:
    """The options of a script as `name value, …`, for a results file; those that were not given are left out.

    A path is shown by its last part only, so that no results file names folders of the machine that it was made on.
    """
    given = {name: value for name, value in vars(options).items() if name not in _UNTOLD and value is not None}
    return ", ".join(f"{name.replace('_', ' ')} {_told(value)}" for name, value in given.items())


_UNTOLD = frozenset({"out", "child", "save"})


def _told(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_told, value)) or "none"
    if isinstance(value, Path):
        return value.name
    return f"{value:g}" if isinstance(value, float) else str(value)


def spread(values: Sequence[float | None]) -> str | None:
    """The median and, in brackets, the least and the most, with three significant digits; None if a value is."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    middle = _cell(float(statistics.median(known)))
    return middle if len(known) == 1 else f"{middle} ({_cell(float(min(known)))} to {_cell(float(max(known)))})"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; floats with three significant digits, None as a dash."""
    return "\n".join(map(_line, [columns, ["---"] * len(columns), *rows]))


def write_plot(
    path: Path,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_scale: str = "log",
) -> None:
    """Write a PNG with one line through the points (x, y) of each series."""
    # A figure of its own rather than pyplot's: no global state, no window.
    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, xscale=x_scale)
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _line(row: Sequence[object]) -> str:
    return f"| {' | '.join(map(_cell, row))} |"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    # Not the plain format: it writes 1,234 seconds as 1.23e+03.
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return str(value)


def _processor() -> str:
    """The processor as Linux tells it, with family and model where its name leaves them out, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    generation = [f"{name} {known[name]}" for name in ("cpu family", "model") if name in known]
    return " ".join(
        [known.get("model name", platform.machine()), *([f"({', '.join(generation)})"] if generation else [])]
    )


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
