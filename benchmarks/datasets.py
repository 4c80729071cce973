"""The capability tasks that benchmarks measure, from a folder of published data sets.

    FOLDER/wikitext2_test.raw           WikiText-2's test text
    FOLDER/lambada_test.jsonl           {"text": ...} a line
    FOLDER/hellaswag_val_full.txt.bz2   six lines a task: context, index of the right ending, four endings
    FOLDER/sst2_dev.tsv                 sentence, tab, 1 for positive or 0

WikiText is taken raw: its spaces around punctuation and its " @-@ " stay, so a perplexity here compares with others of
this table only. The slice is one of characters, so models with different tokenizers are measured on the same text.
"""

import bz2
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from worker.evaluation.capability import Choice, ChoiceTask, LastWordTask, Task, TextTask

T = TypeVar("T")

ROWS = 500
SEED = 0
WIKITEXT_CHARS = 280_000
WINDOW_TOKENS = 512
_VERBALIZERS = ("negative", "positive")


def capability_tasks(folder: Path, names: Sequence[str] = ()) -> tuple[Task, ...]:
    """The named tasks, by default WikiText-2, LAMBADA, HellaSwag and SST-2; the last three as 500 rows.

    Raises:
        OSError: a file is missing; ValueError: it is not what it should be.
    """
    return tuple(TASKS[name](folder) for name in names or TASKS)


def wikitext(folder: Path) -> TextTask:
    """The first 280,000 characters of the test text, to the end of a line; more than 60,000 tokens of SmolLM2."""
    text = (folder / "wikitext2_test.raw").read_text(encoding="utf-8")
    return TextTask("WikiText-2", (text[:WIKITEXT_CHARS].rpartition("\n")[0],), WINDOW_TOKENS)


def lambada(folder: Path) -> LastWordTask:
    """Passages whose last word is to be said."""
    lines = (folder / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines()
    return LastWordTask("LAMBADA", tuple(json.loads(line)["text"] for line in _slice(lines)))


def hellaswag(folder: Path) -> ChoiceTask:
    """Beginnings of a scene, and four ways in which it goes on."""
    lines = bz2.decompress((folder / "hellaswag_val_full.txt.bz2").read_bytes()).decode().splitlines()
    if len(lines) % 6:
        raise ValueError(f"HellaSwag has six lines a task, the file has {len(lines)}")
    tasks = [lines[start : start + 6] for start in range(0, len(lines), 6)]
    choices = [Choice(context, tuple(endings), int(right)) for context, right, *endings in _slice(tasks)]
    return ChoiceTask("HellaSwag", tuple(choices))


def sst2(folder: Path) -> ChoiceTask:
    """Sentences of film reviews, as a question whose answer is one of two words."""
    lines = (folder / "sst2_dev.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.rsplit("\t", 1) for line in _slice(lines)]
    question = "{}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    choices = [Choice(question.format(sentence.strip()), _VERBALIZERS, int(label)) for sentence, label in rows]
    return ChoiceTask("SST-2", tuple(choices))


TASKS: Mapping[str, Callable[[Path], Task]] = {
    "WikiText-2": wikitext,
    "LAMBADA": lambada,
    "HellaSwag": hellaswag,
    "SST-2": sst2,
}
"""What reads each task, by the task's name."""


def _slice(rows: Sequence[T]) -> list[T]:
    return random.Random(SEED).sample(rows, ROWS)
