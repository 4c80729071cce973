"""Makes worker/training/calibration.jsonl: what a model says when nobody asks it anything in particular.

    .venv/bin/python -m benchmarks.calibration_text --model FOLDER --out worker/training/calibration.jsonl

The model asks itself questions, from the chat template's text up to where the user's turn begins, and answers them;
then it writes pieces, each begun by one random word of its vocabulary or by one of `OPENINGS`, with which texts of many
kinds begin. Everything is sampled with temperature 1
and top-p 0.95, seed 0. Rows are {"prompt": question or null, "text": what it said}. To make it again gives texts of the
same kind, not the same texts: a sample follows the last bits of a machine's arithmetic.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from benchmarks.report import progress
from service.schemas import Format
from worker.model import BaseModel, load_base
from worker.training.encode import prompt_token_ids

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 0.95}
BATCH = 64
QUESTIONS, QUESTION_TOKENS, QUESTION_CHARS = 64, 60, range(8, 401)
ANSWER_TOKENS = 120
PIECES, PIECE_TOKENS, PIECE_CHARS = 96, 150, 40
PIECES_PER_OPENING = 8
OPENINGS = (
    "Question:", "Problem:", "Q: How many", "A review of", "Review: The film", "How to", "Step 1:", "Recipe:", '"',
    'She said, "', "def", "import", "In the news today,", "Abstract:", "Dear", "Theorem.", "The following list",
    "Which of the following", "He looked at", "Chapter 1\n\n",
)  # fmt: skip
_MARK = "\0"


class Row(TypedDict):
    """A text, and the question that it answers or None."""

    prompt: str | None
    text: str


def main() -> None:
    """Sample the texts and write the file."""
    options = _parser().parse_args()
    torch.set_num_threads(options.threads)
    base = load_base(str(options.model))
    with progress() as shown:
        rows = texts(base, shown)
    options.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} texts, {sum(row['prompt'] is not None for row in rows)} of them answers")


def texts(
    base: BaseModel,
    shown: Progress,
    *,
    questions: int = QUESTIONS,
    pieces: int = PIECES,
    per_opening: int = PIECES_PER_OPENING,
) -> list[Row]:
    """Answers to the model's own questions, then prose. Seeds torch."""
    torch.manual_seed(0)
    task = shown.add_task("questions", total=2 * questions + pieces + per_opening * len(OPENINGS))
    asked: list[str] = []
    opening = _user_turn(base.tokenizer)
    for size in _batch_sizes(questions):
        said = _sampled(base, [opening] * size, QUESTION_TOKENS)
        asked += [text.strip() for text in said if len(text.strip()) in QUESTION_CHARS]
        shown.advance(task, size)
    rows: list[Row] = []
    shown.update(task, description="answers")
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        prompts = [prompt_token_ids(base.tokenizer, question, Format.CHAT) for question in batch]
        answers = _sampled(base, prompts, ANSWER_TOKENS)
        rows += [Row(prompt=question, text=text) for question, text in zip(batch, answers, strict=True) if text.strip()]
        shown.advance(task, len(batch))
    shown.update(task, description="prose")
    begun = [[token] for token in beginnings(base.tokenizer, pieces)]
    openings = [opening for opening in OPENINGS for _ in range(per_opening)]
    begun += [list(base.tokenizer(opening, add_special_tokens=False).input_ids) for opening in openings]
    for start in range(0, len(begun), BATCH):
        batch_ids = begun[start : start + BATCH]
        said = _sampled(base, batch_ids, PIECE_TOKENS)
        whole = [f"{base.tokenizer.decode(ids)}{text}" for ids, text in zip(batch_ids, said, strict=True)]
        rows += [Row(prompt=None, text=text) for text in whole if len(text) > PIECE_CHARS]
        shown.advance(task, len(batch_ids))
    shown.remove_task(task)
    return rows


def beginnings(tokenizer: PreTrainedTokenizerBase, count: int) -> list[int]:
    """Random tokens that are the beginning of a sentence: capitalised, of ASCII letters, more than two of them."""
    shuffled = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(1)).tolist()
    found: list[int] = []
    for token in shuffled:
        word = str(tokenizer.decode([token]))
        if len(word) > 2 and word.isascii() and word.isalpha() and word[0].isupper():
            found.append(token)
        if len(found) == count:
            return found
    raise ValueError(f"the vocabulary has {len(found)} words to begin with, not {count}")


def _user_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The chat template's ids up to where the user's own text begins."""
    turn = [{"role": "user", "content": _MARK}]
    text = str(tokenizer.apply_chat_template(turn, tokenize=False))
    return list(tokenizer(text.partition(_MARK)[0], add_special_tokens=False).input_ids)


def _batch_sizes(count: int) -> Iterator[int]:
    yield from (min(BATCH, count - start) for start in range(0, count, BATCH))


@torch.no_grad()
def _sampled(base: BaseModel, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
    """What the model says behind each prompt, up to the end of its turn."""
    # Only some of transformers' models have it, so their common type does not say that this one has.
    generate: Any = base.model.generate
    longest = max(map(len, prompts))
    padding = base.tokenizer.pad_token_id
    ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = generate(
        input_ids=ids.to(base.device),
        attention_mask=mask.to(base.device),
        max_new_tokens=tokens,
        pad_token_id=padding,
        eos_token_id=base.tokenizer.eos_token_id,
        **SAMPLING,
    )
    token_ids = [row[longest:].tolist() for row in output]
    ends = [
        row.index(base.tokenizer.eos_token_id) if base.tokenizer.eos_token_id in row else len(row) for row in token_ids
    ]
    return [
        str(base.tokenizer.decode(row[:end], skip_special_tokens=True))
        for row, end in zip(token_ids, ends, strict=True)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration_text")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    return parser


if __name__ == "__main__":
    main()
