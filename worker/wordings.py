"""What the wordings of a whole set of edits are to each other: which are trained on, and which may measure the set.

Wordings are the same if the service takes them for the same prompt. Takes edits and returns what is left of them.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Protocol

from service.schemas import normalise_text
from worker.training.encode import TrainingEdit

log = logging.getLogger(__name__)


class Worded(Protocol):
    """An edit by its wordings: the prompt and the paraphrases are trained on, the rephrases are not."""

    @property
    def prompt(self) -> str: ...  # noqa: D102
    @property
    def rephrases(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def paraphrases(self) -> Sequence[str]: ...  # noqa: D102


def untrained_rephrases(edits: Sequence[Worded]) -> list[tuple[str, ...]]:
    """Return each edit's rephrases but those that one of `edits` trains on: they measure what was learned by heart."""
    trained = {normalise_text(text) for edit in edits for text in (edit.prompt, *edit.paraphrases)}
    return [tuple(text for text in edit.rephrases if normalise_text(text) not in trained) for edit in edits]


def without_contradicted(edits: Sequence[TrainingEdit]) -> list[TrainingEdit]:
    """Return `edits`, oldest first, without paraphrases to which another one gives another target; logs which.

    No training can learn both. A prompt is kept whatever its age, as it is what its edit is verified by; of two
    paraphrases that of the newer edit is.
    """
    kept = {normalise_text(text): edit for edit in edits for text in edit.paraphrases}
    kept |= {normalise_text(edit.prompt): edit for edit in edits}
    return [dataclasses.replace(edit, paraphrases=tuple(_uncontradicted(edit, kept))) for edit in edits]


def _uncontradicted(edit: TrainingEdit, kept: dict[str, TrainingEdit]) -> list[str]:
    left: list[str] = []
    for number, text in enumerate(edit.paraphrases):
        other = kept[normalise_text(text)]
        if other.target == edit.target:
            left.append(text)
        else:
            log.warning(
                "edits.contradicted_paraphrase_left_out",
                extra={"edit": edit.id, "paraphrase": number, "contradicted_by": other.id},
            )
    return left
