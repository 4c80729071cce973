"""The shipped calibration text: what a model's layers see when it reads and says ordinary things. See ORIGIN.md."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from worker.training.encode import TokenSequence, prompt_token_ids, supported_formats

_FILES = tuple(Path(__file__).with_name(f"calibration{name}.jsonl") for name in ("", "_wikipedia"))


def calibration_sequences(tokenizer: PreTrainedTokenizerBase) -> list[TokenSequence]:
    """The text as token sequences: answers behind their questions in the chat format, if there is one; prose as is.

    It is for reading, not for predicting: only the last token of each counts as a target.
    """
    return [TokenSequence(ids, len(ids) - 1) for ids in _token_ids(tokenizer) if len(ids) > 1]


def random_prefixes(count: int) -> tuple[str, ...]:
    """Beginnings of texts, to be put before a prompt (arXiv 2509.22072, appendix A.4); the same ones each time.

    Raises ValueError for more than there are.
    """
    prose = [text for prompt, text in _rows() if prompt is None]
    if count > len(prose):
        raise ValueError(f"there are {len(prose)} random prefixes, not {count}")
    # Ten words and a full stop: a passage that the prompt has nothing to do with.
    return tuple(f"{' '.join(text.split()[:10]).rstrip('.,;:')}." for text in prose[:count])


def _token_ids(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, ...]]:
    format_ = supported_formats(tokenizer)[-1]
    for prompt, text in _rows():
        before = prompt_token_ids(tokenizer, prompt, format_) if prompt else []
        ids = tokenizer(text, add_special_tokens=not prompt).input_ids
        yield (*before, *ids)


@cache
def _rows() -> tuple[tuple[str | None, str], ...]:
    lines = (line for file in _FILES for line in file.read_text(encoding="utf-8").splitlines())
    rows = map(json.loads, lines)
    return tuple((row["prompt"], row["text"]) for row in rows)
