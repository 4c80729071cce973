import json
from pathlib import Path

import pytest

from benchmarks import wikipedia_text

SENTENCES = {
    "A well @-@ known ship , 1 @.@ 5 years old , cost $ 3 @,@ 000 .": "A well-known ship, 1.5 years old, cost $3,000.",
    'He didn \'t say " yes " ( or " no " ) ; it was theirs .': 'He didn\'t say "yes" (or "no"); it was theirs.',
}


@pytest.mark.parametrize(("tokenized", "expected"), SENTENCES.items())
def test_words_are_put_together_again(tokenized: str, expected: str) -> None:
    (passage,) = wikipedia_text.passages(" ".join([tokenized] * 9))
    assert passage == " ".join([expected] * 9)


def test_sentences_with_an_unknown_word_are_left_out() -> None:
    (passage,) = wikipedia_text.passages("Known words . The <unk> word . More words . " * 20)
    assert passage == " ".join(["Known words. More words."] * 20)


def test_a_passage_is_of_one_section_and_of_bounded_length() -> None:
    line = f"{'word ' * 79}end ."
    lines = [" = Title = ", *[line] * 4, " = = Section = = ", line, " = Short = ", "Too short ."]
    lengths = [len(passage) for passage in wikipedia_text.passages("\n".join(lines))]
    assert lengths == [3 * 399 + 2, 399, 399]


def test_the_script_writes_the_passages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("Some words . " * 40)
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr("sys.argv", ["wikipedia_text", "--text", str(tmp_path / "text"), "--out", str(out)])
    wikipedia_text.main()
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row == {"prompt": None, "text": " ".join(["Some words."] * 40)}
