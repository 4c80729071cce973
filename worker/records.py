"""What a version keeps of how it was made, and of its edits: one form for the service's runs and for errata-train.

Everything here is a function of its arguments; nothing knows where versions or edits are.
"""

import dataclasses
import hashlib
import importlib.metadata
import time
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import TypeAdapter

from service.manifest import Base, Manifest, VersionInfo
from service.schemas import Edit, EditCounts, EditRequest, Format, StoredEdit, VersionRecord, VersionState
from worker.edit_files import EditRow
from worker.evaluation.metrics import Metrics
from worker.model import BaseModel
from worker.training.breadth_first import TrainingResult
from worker.training.config import TrainingConfig
from worker.training.encode import supported_formats

_FORMATS = TypeAdapter(list[Format])
_LIBRARIES = ("errata", "torch", "transformers")


def version_info(
    base: BaseModel, version: int, *, parent: int | None, run: dict[str, Any], metrics: dict[str, Any]
) -> VersionInfo:
    """What the version store is told of a new version."""
    return VersionInfo(
        version=version,
        parent=parent,
        base=Base(name=base.name, fingerprint=base.fingerprint),
        location=base.location,
        run=run,
        metrics=metrics,
        created_at=int(time.time()),
    )


def version_record(manifest: Manifest, state: VersionState) -> VersionRecord:
    """The registry's record of a version that the store has; nothing but the manifest is needed to make it again."""
    run = dict(manifest.run)
    return VersionRecord(
        version=manifest.version,
        parent=manifest.parent,
        run=str(run["id"]) if "id" in run else None,
        state=state,
        fingerprint=manifest.base.fingerprint,
        location=manifest.location,
        tensors={name: tensor.sha256 for name, tensor in manifest.tensors.items()},
        formats=_FORMATS.validate_python(run.get("formats", [])),
        training=run,
        metrics=dict(manifest.metrics),
        edits=EditCounts.model_validate(run.get("edits", {"count": 0, "added": 0, "removed": 0})),
        created_at=manifest.created_at,
    )


def training_record(
    base: BaseModel,
    config: TrainingConfig,
    result: TrainingResult,
    edits: EditCounts,
    *,
    run: str | None = None,
    start: int = 0,
    chain: int = 0,
    processes: int = 1,
) -> dict[str, Any]:
    """What the manifest keeps so that the training can be repeated bit for bit, and how it went.

    Args:
        base: the model and the tuned location in it.
        config: what it was trained with.
        result: what came of it.
        edits: sizes of the version's edit set.
        run: id of the service's run; None without a service.
        start: the version that it began with; 0 is the base.
        chain: how many trainings in a row began with the version before.
        processes: how many shared each batch.
    """
    formats = config.formats or supported_formats(base.tokenizer)
    return {
        **({} if run is None else {"id": run}),
        "edits": edits.model_dump(),
        "formats": [form.value for form in formats],
        "configuration": config.as_record(),
        "start": start,
        "chain": chain,
        "epochs": [dataclasses.asdict(epoch) for epoch in result.epochs],
        "stopped": result.stopped,
        "steps": result.steps,
        "train_s": result.train_s,
        "processes": processes,
        "device": str(base.device),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "tokenizer_sha256": hashlib.sha256(_tokenizer_text(base).encode()).hexdigest(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }


def _tokenizer_text(base: BaseModel) -> str:
    """What decides which tokens a run sees: vocabulary and merges, and the chat template."""
    backend: Any = base.tokenizer
    return f"{backend.backend_tokenizer.to_str()}\n{base.tokenizer.chat_template or ''}"


def metrics_record(metrics: Metrics) -> dict[str, Any]:
    """A version's metrics as the manifest keeps them."""
    formats = {form.value: dataclasses.asdict(measured) for form, measured in metrics.formats.items()}
    return {
        "formats": formats,
        "locality": metrics.locality,
        "perplexity": metrics.perplexity,
        "base_perplexity": metrics.base_perplexity,
        "perplexity_ratio": metrics.perplexity_ratio,
        "edits_measured": metrics.edits_measured,
        "evaluate_s": metrics.evaluate_s,
    }


def stored_edit(edit: Edit, sequence: int) -> dict[str, Any]:
    """An edit of the service as the version keeps it."""
    said = edit.model_dump(include=set(StoredEdit.model_fields) - {"sequence"})
    return StoredEdit(**said, sequence=sequence).model_dump(mode="json")


def stored_rows(rows: Sequence[EditRow]) -> list[dict[str, Any]]:
    """A file's edits as the version keeps them, numbered in their order.

    The same edit has the same id in every version, and no other edit has it: rows of two files may share a name.
    """
    now = int(time.time())
    return [_stored_row(row, sequence, now).model_dump(mode="json") for sequence, row in enumerate(rows, 1)]


def _stored_row(row: EditRow, sequence: int, created_at: int) -> StoredEdit:
    said = EditRequest(
        prompt=row.prompt, target=row.target, rephrases=list(row.rephrases), paraphrases=list(row.paraphrases)
    )
    digest = hashlib.sha256(said.model_dump_json().encode()).hexdigest()
    return StoredEdit(**said.model_dump(), id=f"edit_{digest[:24]}", created_at=created_at, sequence=sequence)
