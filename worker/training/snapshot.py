"""A run between two epochs, in memory and in a file, so that a killed run goes on where it was."""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.delta import tensor_sha256
from worker.folders import write_file
from worker.model import BaseModel
from worker.training.config import TrainingConfig
from worker.training.encode import TokenSequence

log = logging.getLogger(__name__)

# Another number for other contents of a snapshot: one that an older release left is of another run.
_FORMAT = 5
_SAVE_EVERY_S = 10.0


class SnapshotMismatchError(Exception):
    """The snapshot is of another run."""


@dataclass(frozen=True)
class EpochReport:
    """What one epoch did.

    `epoch` is its number from 1; `loss` the mean loss and `worst_token_loss` the worst token (nats, before its steps)
    over the `visited` of all `sequences`, of which `unlearned` were not learned; `steps` of its `batches` changed the
    tensors; `tokens` are those of the visited, a beginning that several share counted with each; `spent` is the part
    of the run's budget that this epoch used up, `budget` the part that is used up, from 0 to 1, anew when edits join.
    """

    epoch: int
    loss: float
    worst_token_loss: float
    sequences: int
    visited: int
    unlearned: int
    batches: int
    steps: int
    tokens: int
    seconds: float
    spent: float
    budget: float


@dataclass(frozen=True)
class Snapshot:
    """What it takes to go on as if nothing had happened.

    `tensors`, on the CPU, are the updates, the optimiser's states and the shuffle's; `identity` stands for everything
    that the run's result depends on but its `seed`, with its first `sequences` sequences.
    """

    tensors: Mapping[str, Tensor]
    identity: str
    seed: int
    sequences: int
    schedule: Mapping[str, Any]
    reports: tuple[EpochReport, ...]


def identity(
    base: BaseModel, config: TrainingConfig, start: Mapping[str, Tensor], sequences: Sequence[TokenSequence]
) -> str:
    """The sha256, in hex, of what a run's result depends on, but its seed: the snapshot holds the shuffle's state."""
    whole = hashlib.sha256()
    inputs = dataclasses.replace(config, seed=0).as_record()
    tensors = {name: tensor_sha256(tensor) for name, tensor in sorted(start.items())}
    dtypes = [str(base.dtype), str(base.model.dtype)]
    run = [_FORMAT, base.fingerprint, base.location, dtypes, inputs, tensors]
    whole.update(json.dumps(run).encode())
    for sequence in sequences:
        whole.update(json.dumps([sequence.token_ids, sequence.prompt_tokens]).encode())
    return whole.hexdigest()


def save(path: Path, snapshot: Snapshot) -> None:
    """Replace the file at `path`, at once and durably. Raises OSError."""
    values = dataclasses.asdict(dataclasses.replace(snapshot, tensors={}))
    data = safetensors.torch.save(dict(snapshot.tensors), metadata={"snapshot": json.dumps(values)})
    write_file(path, data, durable=True)


class Saver:
    """Keeps the newest snapshot on disk, not more often than a restart is worth. A full disk does not end the run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = time.monotonic() + _SAVE_EVERY_S

    def __call__(self, take: Callable[[], Snapshot]) -> None:
        """Save what `take` returns, if it is time to."""
        if time.monotonic() < self._next:
            return
        try:
            save(self._path, take())
        except OSError as error:
            log.warning("run.snapshot_not_saved", extra={"path": str(self._path), "reason": str(error)})
        self._next = time.monotonic() + _SAVE_EVERY_S


def load(path: Path) -> Snapshot | None:
    """Read a snapshot; None when there is none, or none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["snapshot"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
            reports = tuple(EpochReport(**report) for report in values.pop("reports"))
            return Snapshot(**{**values, "tensors": tensors, "reports": reports})
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
