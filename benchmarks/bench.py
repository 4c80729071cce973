"""What the benchmarks of training share: their command line, their edits, and one base model that is trained and asked.

No script: those that train import it.
"""

import argparse
import dataclasses
import itertools
import random
import resource
import shutil
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from benchmarks.report import RESULTS
from service.demo.script import facts
from service.schemas import Format, normalise_text
from worker.edit_files import EditRow, read_edits
from worker.evaluation.metrics import Metrics
from worker.model import BaseModel, load_base
from worker.training.breadth_first import FROM_BASE, Hooks, Start, TrainingResult
from worker.training.config import TrainingConfig, config_for
from worker.training.encode import TokenSequence
from worker.training.prefix import PrefixCache
from worker.training.run_state import encoder_for
from worker.training.snapshot import EpochReport
from worker.workbench import Workbench, evaluation_edit, training_edit

# The capability tasks alone are some 0.6 GB of SmolLM2-135M's hidden states, and must not be computed twice.
PREFIX_BYTES = 4 << 30

QUALITY = (
    "reliability raw", "reliability chat", "generalization raw", "generalization chat", "locality", "perplexity ratio",
)  # fmt: skip
"""The columns that `quality` fills."""


def parser(name: str, *, one_location: bool = True) -> argparse.ArgumentParser:
    """The options that all of these scripts have; `name` is the script's and its results'."""
    options = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    options.add_argument("--model", required=True, type=Path, help="folder of the base model")
    if one_location:
        options.add_argument("--location", default="auto", help="tuned parameter, module or layer")
    options.add_argument("--edits", type=Path, action="append", required=True, help="JSON list or lines; repeatable")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    options.add_argument("--out", type=Path, default=RESULTS / f"{name}.md", help="where the results go")
    return options


def open_bench(
    options: argparse.Namespace, location: str, progress: Progress, *, prefix_bytes: int = PREFIX_BYTES
) -> "Bench":
    """Load the model that the options name. Raises CheckpointError, LocationError, OSError as loading does."""
    torch.set_num_threads(options.threads)
    return Bench(load_base(str(options.model), location), progress, prefix_bytes=prefix_bytes)


def edit_pool(paths: Sequence[Path], at_least: int) -> list[EditRow]:
    """One edit of each file in turn; a prompt's later edit supersedes its earlier ones.

    Raises:
        SystemExit: there are fewer than `at_least`.
        EditFileError, OSError: a file cannot be read.
    """
    edits: dict[str, EditRow] = {}
    for turn in itertools.zip_longest(*map(read_edits, paths)):
        for row in filter(None, turn):
            prompt = normalise_text(row.prompt)
            edits.pop(prompt, None)
            edits[prompt] = row
    if len(edits) < at_least:
        raise SystemExit(f"{at_least} edits are needed, the files hold {len(edits)}")
    return list(edits.values())


def sample(rows: Sequence[EditRow], count: int, seed: int = 0) -> list[EditRow]:
    """So many of the edits, drawn at random but the same each time; 0: all."""
    return random.Random(seed).sample(rows, count) if 0 < count < len(rows) else list(rows)


def demo_edits() -> list[EditRow]:
    """The demo's 20 edits, for what is measured in time only."""
    return [EditRow(str(number), fact.prompt, fact.target) for number, fact in enumerate(facts())]


def every_step(epochs: int) -> TrainingConfig:
    """So many epochs over all edits in which every batch takes its step, with nothing preserved."""
    return TrainingConfig(
        max_epochs=epochs, min_steps=0, preserve=0, skip_learned=False, loss_threshold=0, token_threshold=0
    )


def quality(metrics: Metrics) -> list[float | None]:
    """The columns `QUALITY`; None for a format that was not asked or has no rephrases."""
    found = [metrics.formats.get(format_) for format_ in (Format.RAW, Format.CHAT)]
    reliability = [shares.reliability if shares else None for shares in found]
    generalization = [shares.generalization if shares else None for shares in found]
    return [*reliability, *generalization, metrics.locality, metrics.perplexity_ratio]


class Bench:
    """A workbench in a temporary folder, whose work is shown."""

    def __init__(self, base: BaseModel, progress: Progress, *, prefix_bytes: int = PREFIX_BYTES) -> None:
        self.base = base
        self.progress = progress
        self.folder = Path(tempfile.mkdtemp(prefix="errata-bench-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.prefix = PrefixCache(self.folder / "prefix", capacity_bytes=prefix_bytes)
        self._workbench = Workbench(base, self.prefix, self.folder)

    @property
    def usual(self) -> TrainingConfig:
        """The configuration that the model is trained with unless told otherwise."""
        return config_for(self.base.model.config.to_dict())

    def sequences(self, rows: Sequence[EditRow], config: TrainingConfig) -> list[TokenSequence]:
        """The edits as they are trained."""
        encoder = encoder_for(self.base, config)
        return [sequence for row in rows for sequence in encoder.encode(training_edit(row))]

    def prepare(self, rows: Sequence[EditRow], config: TrainingConfig) -> float:
        """Do what is done once ever, so that it is not timed with a run; the prefix pass's part of it, in seconds."""
        self._workbench.prepare_training(config)
        sequences = self.sequences(rows, config)
        task = self.progress.add_task(f"prefix of {len(sequences)} sequences", total=None)
        started = time.perf_counter()
        self.prefix.fill(self.base, sequences, should_stop=lambda: False)
        elapsed = time.perf_counter() - started
        self.progress.remove_task(task)
        return elapsed

    def train(self, rows: Sequence[EditRow], config: TrainingConfig, start: Start = FROM_BASE) -> TrainingResult:
        """One run. Its seconds leave out the preservation's factors, which a worker has ready."""
        task = self.progress.add_task(f"train {len(rows)} edits", total=config.max_epochs)

        def show(epoch: EpochReport) -> None:
            found = f"loss {epoch.loss:.3f}, {epoch.unlearned} of {epoch.visited} not learned"
            self.progress.update(task, advance=1, description=f"train {len(rows)} edits: {found}")

        try:
            edits = [training_edit(row) for row in rows]
            return self._workbench.train(edits, config, start=start, hooks=Hooks(on_epoch=show))
        finally:
            self.progress.remove_task(task)

    def evaluate(self, rows: Sequence[EditRow], tensors: Mapping[str, Tensor], *, rephrased: bool = True) -> Metrics:
        """Ask the edits, and their rephrases, in all formats."""
        task = self.progress.add_task(f"ask {len(rows)} edits", total=None)
        asked = [evaluation_edit(row if rephrased else dataclasses.replace(row, rephrases=())) for row in rows]
        try:
            return self._workbench.evaluate(asked, tensors)
        finally:
            self.progress.remove_task(task)


def forget_peak() -> None:
    """Let `peak_rss_bytes` begin anew. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """The most memory that this process has held, what it has mapped of files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
