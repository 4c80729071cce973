"""The shipped texts that locality and capability are measured on. Their origin and licences: ORIGIN.md."""

import json
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).parent


def locality_prompts() -> tuple[str, ...]:
    """24 prompts that no edit is about."""
    return _column(_FOLDER / "locality_probes.jsonl", "prompt")


def capability_passages() -> tuple[str, ...]:
    """19 passages of ordinary English prose, about 1,500 tokens together."""
    return _column(_FOLDER / "capability_text.jsonl", "text")


def _column(path: Path, name: str) -> tuple[str, ...]:
    rows: Sequence[dict[str, str]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(row[name] for row in rows)
