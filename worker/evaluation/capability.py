"""How well the model still does what no edit was about: predict text, choose an ending, find the last word.

Every task is teacher-forced scores of token sequences in raw format, so the frozen layers below the tuned one run once
for all the versions that are measured with the same `PrefixCache`.

The first token: a text or context begins with what the tokenizer itself puts before a text, as on a server. Where that
is a BOS token, all that follows is scored; SmolLM2's tokenizer adds none, and then the first token of a window is given
and not scored.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from service.schemas import Format
from worker.evaluation.probes import capability_passages
from worker.model import BaseModel
from worker.training.encode import TokenSequence, prompt_token_ids, target_token_ids
from worker.training.prefix import PrefixCache
from worker.training.score import TokenScores, score

# Longer than any shipped passage, and within every model's context.
_PASSAGE_WINDOW_TOKENS = 512


@dataclass(frozen=True)
class TextTask:
    """Perplexity per token of texts, each cut into windows that do not overlap: the stride is the window.

    `window_tokens` counts BOS, where the tokenizer adds one; it is at least 2.
    """

    name: str
    texts: tuple[str, ...]
    window_tokens: int


@dataclass(frozen=True)
class Choice:
    """A context, the endings to choose from (joined to it by a space), and the index of the right one."""

    context: str
    endings: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class ChoiceTask:
    """Which ending the model finds likeliest, by log-likelihood plain and per character of the ending."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class LastWordTask:
    """Whether greedy decoding says the last word of each text: each of its tokens is the likeliest in its place.

    A word is what follows the last space.
    """

    name: str
    texts: tuple[str, ...]


Task = TextTask | ChoiceTask | LastWordTask


class Measure(StrEnum):
    """What a task measures. Perplexity is per token and better when lower; accuracies are shares from 0 to 1."""

    PERPLEXITY = "perplexity"
    ACCURACY = "accuracy"
    NORMALISED_ACCURACY = "accuracy per character"


@dataclass(frozen=True)
class TaskResult:
    """What a model reached in one task. `items` are windows, choices or texts."""

    task: str
    values: Mapping[Measure, float]
    items: int


def measure(base: BaseModel, tensors: Mapping[str, Tensor], prefix: PrefixCache, task: Task) -> TaskResult:
    """Measure one task with `tensors` (by parameter name) in place of the base's own.

    Raises:
        ValueError: the task is empty, or a context, an ending or a word has no tokens.
    """
    items = _items(base, task)
    sequences = [sequence for item in items for sequence in item]
    if not sequences:
        raise ValueError(f"task {task.name!r} has nothing to score")
    scores = iter(score(base, tensors, prefix, sequences))
    by_item = [[next(scores) for _ in item] for item in items]
    return TaskResult(task.name, _values(task, by_item), len(items))


def perplexity(base: BaseModel, tensors: Mapping[str, Tensor], prefix: PrefixCache) -> float:
    """Perplexity per token of the shipped passages, with `tensors` (by parameter name) in place of the base's own."""
    task = TextTask("passages", capability_passages(), _PASSAGE_WINDOW_TOKENS)
    return measure(base, tensors, prefix, task).values[Measure.PERPLEXITY]


def _items(base: BaseModel, task: Task) -> list[list[TokenSequence]]:
    match task:
        case TextTask():
            return [[window] for text in task.texts for window in windows(base, text, task.window_tokens)]
        case ChoiceTask():
            return [[_continuation(base, it.context, ending) for ending in it.endings] for it in task.choices]
        case LastWordTask():
            parted = [text.strip().rpartition(" ") for text in task.texts]
            return [[_continuation(base, context, word)] for context, _, word in parted]


def windows(base: BaseModel, text: str, window_tokens: int) -> list[TokenSequence]:
    """A text's windows of so many tokens; all of a window but what the model is given first is to be predicted.

    Raises ValueError if a window has no room for a token to predict.
    """
    beginning = tuple(base.tokenizer("").input_ids)
    # Not verbose: the whole text is longer than the model's context, which the tokenizer would warn of.
    ids = tuple(base.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    step = window_tokens - len(beginning)
    if step < 1 or window_tokens < 2:
        raise ValueError(f"a window of {window_tokens} tokens has no room to predict one")
    parts = [(*beginning, *ids[start : start + step]) for start in range(0, len(ids), step)]
    given = max(len(beginning), 1)
    return [TokenSequence(part, given) for part in parts if len(part) > given]


def _continuation(base: BaseModel, context: str, text: str) -> TokenSequence:
    context_ids = prompt_token_ids(base.tokenizer, context, Format.RAW)
    text_ids = target_token_ids(base.tokenizer, context, text, Format.RAW) if text.strip() else []
    if not context_ids or not text_ids:
        raise ValueError(f"nothing to score, or nothing before it: {text!r} after {context!r}")
    return TokenSequence((*context_ids, *text_ids), len(context_ids))


def _values(task: Task, items: Sequence[Sequence[TokenScores]]) -> dict[Measure, float]:
    match task:
        case TextTask():
            nats = torch.cat([scores.nats for item in items for scores in item])
            # A tensor's exponential: infinite, where math's raises, for a model that was trained to pieces.
            return {Measure.PERPLEXITY: nats.double().mean().exp().item()}
        case ChoiceTask():
            return _choice_values(task, items)
        case LastWordTask():
            return {Measure.ACCURACY: _share(bool(scores.greedy.all()) for (scores,) in items)}


def _choice_values(task: ChoiceTask, items: Sequence[Sequence[TokenScores]]) -> dict[Measure, float]:
    plain = [[scores.nats.double().sum().item() for scores in item] for item in items]
    normalised = [
        [nats / len(ending) for nats, ending in zip(row, choice.endings, strict=True)]
        for row, choice in zip(plain, task.choices, strict=True)
    ]
    right = [choice.right for choice in task.choices]
    return {
        Measure.ACCURACY: _share(row.index(min(row)) == index for row, index in zip(plain, right, strict=True)),
        Measure.NORMALISED_ACCURACY: _share(
            row.index(min(row)) == index for row, index in zip(normalised, right, strict=True)
        ),
    }


def _share(hits: Iterable[bool]) -> float:
    counted = list(hits)
    return sum(counted) / len(counted)
