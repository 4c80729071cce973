"""Reliability, generalization, locality and capability of tuned tensors, against the frozen base."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from service.answers import matches
from service.schemas import Format
from worker.evaluation.answers import ask
from worker.evaluation.capability import perplexity
from worker.evaluation.probes import locality_prompts
from worker.model import BaseModel
from worker.training.encode import supported_formats, target_token_ids
from worker.training.prefix import PrefixCache

LOCALITY_TOKENS = 8
# Beyond the target's own length: its end of sequence, and room for another split of the same text into tokens.
_SPARE_TOKENS = 4


@dataclass(frozen=True)
class EvaluationEdit:
    """An edit as it is measured: the rephrases are asked too, and were never trained on."""

    id: str
    prompt: str
    target: str
    rephrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class FormatMetrics:
    """Shares from 0 to 1. Generalization is None when no edit has rephrases."""

    reliability: float
    generalization: float | None


@dataclass(frozen=True)
class Metrics:
    """What a version is worth.

    `locality` is the share of unrelated prompts, over all formats, whose first 8 greedy tokens are the base's;
    the perplexities are per token of the shipped text.
    """

    formats: Mapping[Format, FormatMetrics]
    locality: float
    perplexity: float
    base_perplexity: float
    edits_measured: int
    evaluate_s: float

    @property
    def perplexity_ratio(self) -> float:
        """Edited over base: 1 means that ordinary text is predicted as well as before."""
        return self.perplexity / self.base_perplexity


class Evaluator:
    """Measures versions of one base model; what the base itself says is found out once."""

    def __init__(self, base: BaseModel, *, prefix: PrefixCache) -> None:
        self._base = base
        self._prefix = prefix
        self._formats = supported_formats(base.tokenizer)

    def prepare(self) -> None:
        """Find out what the base itself says, so that the first evaluation is as quick as the next."""
        _ = self._base_beginnings, self._base_perplexity

    def evaluate(
        self,
        edits: Sequence[EvaluationEdit],
        tensors: Mapping[str, Tensor],
        formats: Sequence[Format] | None = None,
    ) -> Metrics:
        """Measure `tensors` (by parameter name) on `edits`, in `formats` or all that the tokenizer supports."""
        started = time.perf_counter()
        if not edits:
            raise ValueError("there is nothing to evaluate without an edit")
        return Metrics(
            formats={format_: self._asked(edits, tensors, format_) for format_ in formats or self._formats},
            locality=self._locality(tensors),
            perplexity=perplexity(self._base, tensors, self._prefix),
            base_perplexity=self._base_perplexity,
            edits_measured=len(edits),
            evaluate_s=time.perf_counter() - started,
        )

    def _asked(self, edits: Sequence[EvaluationEdit], tensors: Mapping[str, Tensor], format_: Format) -> FormatMetrics:
        prompts = [edit.prompt for edit in edits] + [rephrase for edit in edits for rephrase in edit.rephrases]
        limits = [
            _SPARE_TOKENS + len(target_token_ids(self._base.tokenizer, edit.prompt, edit.target, format_))
            for edit in edits
        ]
        limits += [limit for edit, limit in zip(edits, limits, strict=True) for _ in edit.rephrases]
        answers = ask(self._base, prompts, format_, tensors, max_new_tokens=limits)
        asked = [*edits, *(edit for edit in edits for _ in edit.rephrases)]
        hits = [
            matches(answer.text, edit.target, finished=answer.finished)
            for answer, edit in zip(answers, asked, strict=True)
        ]
        direct, rephrased = hits[: len(edits)], hits[len(edits) :]
        return FormatMetrics(
            reliability=sum(direct) / len(direct),
            generalization=sum(rephrased) / len(rephrased) if rephrased else None,
        )

    def _locality(self, tensors: Mapping[str, Tensor]) -> float:
        unchanged = [
            before == after for before, after in zip(self._base_beginnings, self._beginnings(tensors), strict=True)
        ]
        return sum(unchanged) / len(unchanged)

    @cached_property
    def _base_beginnings(self) -> list[tuple[int, ...]]:
        return self._beginnings({})

    @cached_property
    def _base_perplexity(self) -> float:
        return perplexity(self._base, self._base.tuned_tensors(), self._prefix)

    def _beginnings(self, tensors: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
        prompts = locality_prompts()
        return [
            answer.token_ids
            for format_ in self._formats
            for answer in ask(self._base, prompts, format_, tensors, max_new_tokens=LOCALITY_TOKENS)
        ]
