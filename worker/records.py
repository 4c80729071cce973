"""What a version's manifest and record keep of the run that made it."""

import dataclasses
import hashlib
import importlib.metadata
import time
from typing import Any

import torch
from pydantic import TypeAdapter

from service.schemas import Edit, EditCounts, Format, Run, StoredEdit, VersionRecord, VersionState
from worker.delta import Base, Manifest, VersionInfo
from worker.evaluation.metrics import Metrics
from worker.learning import Learned
from worker.model import BaseModel
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


def run_inputs(base: BaseModel, run: Run, learned: Learned, counts: EditCounts) -> dict[str, Any]:
    """What the manifest keeps so that the run can be repeated bit for bit, and how it went."""
    result = learned.result
    return {
        "id": run.id,
        "edits": counts.model_dump(),
        "formats": [form.value for form in supported_formats(base.tokenizer)],
        "configuration": learned.config.as_record(),
        "start": learned.parent or 0,
        "chain": learned.chain,
        "epochs": [dataclasses.asdict(epoch) for epoch in result.epochs],
        "stopped": result.stopped,
        "steps": result.steps,
        "train_s": result.train_s,
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


def summary(metrics: Metrics) -> dict[str, Any]:
    """A version's metrics as the manifest keeps them."""
    formats = {form.value: dataclasses.asdict(measured) for form, measured in metrics.formats.items()}
    return {
        "formats": formats,
        "locality": metrics.locality,
        "perplexity": metrics.perplexity,
        "base_perplexity": metrics.base_perplexity,
        "perplexity_ratio": metrics.perplexity_ratio,
        "edits_measured": len({outcome.edit_id for outcome in metrics.outcomes}),
        "evaluate_s": metrics.evaluate_s,
    }


def stored(edit: Edit, sequence: int) -> dict[str, Any]:
    """An edit as the version keeps it."""
    said = edit.model_dump(include=set(StoredEdit.model_fields) - {"sequence"})
    return StoredEdit(**said, sequence=sequence).model_dump(mode="json")
