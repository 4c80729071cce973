"""Draws the frontier: what every results file of `frontier.py` says of WikiText-2, in one table and one figure.

    .venv/bin/python -m benchmarks.overview

Nothing is measured. The rows are of several commits and machines, which their files tell.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib.figure

from benchmarks.report import RESULTS, markdown_table

# What is aimed at: by the number of edits, the perplexity of WikiText-2 over the base's.
AIMS = {200: 1.03, 1000: 1.08, 3000: 1.15}
_PERPLEXITY = "WikiText-2 ratio"
_KINDS = ("reliability", "generalization")
_COLUMNS = (
    "edits", "location", "configuration",
    "reliability raw", "reliability chat", "generalization raw", "generalization chat", "locality", _PERPLEXITY,
    "LAMBADA points", "HellaSwag points", "SST-2 points", "visits per sequence",
)  # fmt: skip

Row = Mapping[str, str]
"""Cells by column, as they stand in the file; "results" is the file's name."""


def main() -> None:
    """Write `overview.md` and `overview.png` beside the results."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.overview")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    folder: Path = options.parse_args().results
    rows = sorted(
        (row for path in sorted(folder.glob("*.md")) for row in rows_of(path)),
        key=lambda row: (int(row["edits"]), number(row[_PERPLEXITY])),
    )
    draw(rows, folder / "overview.png")
    cells = [[*(row.get(name) for name in _COLUMNS), f"[{row['results']}]({row['results']})"] for row in rows]
    aims = ", ".join(f"{aim:g} at {edits:,} edits" for edits, aim in AIMS.items())
    parts = [
        "# The frontier so far",
        "`benchmarks/overview.py`: every row of `frontier.py` that measured WikiText-2, as its file has it. "
        f"Ratio aimed at: {aims}.",
        markdown_table([*_COLUMNS, "results"], cells),
        "![overview](overview.png)",
    ]
    (folder / "overview.md").write_text("\n\n".join(parts) + "\n")


def rows_of(path: Path) -> Iterator[Row]:
    """Rows of the tables that `frontier.py` wrote into a results file; none of any other file."""
    columns: list[str] = []
    for line in path.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if "configuration" in cells:
            columns = cells if _PERPLEXITY in cells else []
        elif columns and cells and set(cells) != {"---"} and path.stem != "overview":
            yield {**dict(zip(columns, cells, strict=True)), "results": path.name}


def number(cell: str) -> float:
    """The median of a cell, which may tell least and most behind it."""
    return float(cell.split(maxsplit=1)[0])


def draw(rows: Sequence[Row], path: Path) -> None:
    """A panel for each number of edits: generalization over perplexity, the aim as a line."""
    figure = matplotlib.figure.Figure(figsize=(5 * len(AIMS), 5.5), layout="constrained")
    for axes, (edits, aim) in zip(figure.subplots(1, len(AIMS), sharey=True), AIMS.items(), strict=True):
        axes.axvline(aim, linestyle="--", color="grey", label=f"aim: {aim:g}")
        for row in rows:
            if int(row["edits"]) == edits:
                said = [sum(number(row[f"{kind} {how}"]) for how in ("raw", "chat")) / 2 for kind in _KINDS]
                what = f"{row['location'].removeprefix('model.')}, {row['configuration']}"
                label = f"{what} ({row['results'].removesuffix('.md')}): {said[0]:.0%} reliable"
                axes.plot(number(row[_PERPLEXITY]), said[1], marker="o", linestyle="", label=label)
        axes.set(title=f"{edits:,} ZsRE edits", xlabel="WikiText-2 perplexity, ratio to the base's", ylim=(0, 1))
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.axes[0].set_ylabel("generalization, mean of raw and chat")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
