"""Makes worker/training/calibration_wikipedia.jsonl: prose as people write it, from WikiText-2's validation split.

    .venv/bin/python -m benchmarks.wikipedia_text --text wiki.valid.tokens
        --out worker/training/calibration_wikipedia.jsonl

WikiText is tokenized text: spaces around punctuation, `@-@` for a hyphen within a word, `<unk>` for rare words. The
spaces are taken back, and sentences with an unknown word are left out. A row is {"prompt": null, "text": passage}, a
passage being paragraphs of one section, from 300 to 1,200 characters together. One passage in `EVERY` is kept.
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

EVERY = 3
PASSAGE_CHARS = range(300, 1201)
_UNKNOWN = "<unk>"
_REWRITES = (
    (re.compile(r" @(.)@ "), r"\1"),
    (re.compile(r" ([.,;:!?)\]%]|'(?:s|t|re|ve|d|ll)\b)"), r"\1"),
    (re.compile(r"([(\[$£]) "), r"\1"),
    (re.compile(r'" ([^"]*?) "'), r'"\1"'),
)
_SENTENCE_END = re.compile(r"(?<= [.!?]) (?=[A-Z\"])")


def main() -> None:
    """Clean the text and write the file."""
    options = _parser().parse_args()
    kept = list(itertools.islice(passages(options.text.read_text(encoding="utf-8")), 0, None, EVERY))
    rows = (json.dumps({"prompt": None, "text": text}, ensure_ascii=False) for text in kept)
    options.out.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    print(f"{len(kept)} passages, {sum(map(len, kept))} characters")


def passages(tokenized: str) -> Iterator[str]:
    """The articles' prose, cleaned, in passages; what is too short for one is left out."""
    passage = ""
    for line in tokenized.splitlines():
        paragraph = _paragraph(line.strip())
        if paragraph is None or len(passage) + 1 + len(paragraph) >= PASSAGE_CHARS.stop:
            if len(passage) in PASSAGE_CHARS:
                yield passage
            passage = ""
        if paragraph:
            passage = f"{passage}\n{paragraph}".strip()
    if len(passage) in PASSAGE_CHARS:
        yield passage


def _paragraph(line: str) -> str | None:
    """The line's sentences, or None for a heading, at which a passage ends."""
    if line.startswith("= "):
        return None
    text = " ".join(sentence for sentence in _SENTENCE_END.split(line) if _UNKNOWN not in sentence)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wikipedia_text")
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's tokenized validation split")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    return parser


if __name__ == "__main__":
    main()
