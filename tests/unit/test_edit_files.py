import json
from pathlib import Path

import pytest

from worker.edit_files import EditFileError, EditRow, read_edits

ZSRE = {
    "subject": "Crashday", "src": "Who published Crashday?", "pred": "Atari", "rephrase": "Crashday's publisher is?",
    "alt": "Sega", "answers": ["Atari"], "loc": "nq question: who", "loc_ans": "nobody",
}  # fmt: skip
COUNTERFACT = {
    "case_id": 7, "prompt": "The capital of France is", "target_new": "Lyon", "ground_truth": "Paris",
    "subject": "France", "rephrase_prompt": "France's capital:", "locality_prompt": "x", "locality_ground_truth": "y",
}  # fmt: skip
WIKI_BIG_EDIT = {
    "tag": "update", "subject": "Initech", "relation": "chief executive", "object": "Ada Palmer",
    "update": "Who leads Initech?", "ans": "Ada Palmer", "rephrase": "Initech's leader?", "personas": "Arr, who leads?",
    "mhop": "Where was Initech's leader born?", "mhop_ans": "London", "loc": "Who leads Acme?", "loc_ans": "Bob",
}  # fmt: skip
OWN = {"prompt": "a", "target": "b", "rephrases": ["c", " d "], "paraphrases": ["e"], "metadata": {"origin": "me"}}


def written(folder: Path, rows: object, *, lines: bool = False) -> Path:
    path = folder / "edits.json"
    path.write_text("\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows, indent=2))
    return path


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ZSRE, EditRow("edits:1", "Who published Crashday?", "Sega", ("Crashday's publisher is?",))),
        (COUNTERFACT, EditRow("edits:1", "The capital of France is", "Lyon", ("France's capital:",))),
        (WIKI_BIG_EDIT, EditRow("edits:1", "Who leads Initech?", "Ada Palmer", ("Initech's leader?",))),
        ({**WIKI_BIG_EDIT, "rephrase": None}, EditRow("edits:1", "Who leads Initech?", "Ada Palmer")),
        (OWN, EditRow("edits:1", "a", "b", ("c", "d"), ("e",))),
        ({"prompt": "a", "target": "b"}, EditRow("edits:1", "a", "b")),
    ],
)
def test_each_schema_is_read_from_a_list_and_from_lines(
    tmp_path: Path, lines: bool, row: dict[str, object], expected: EditRow
) -> None:
    assert read_edits(written(tmp_path, [row], lines=lines)) == [expected]


def test_the_edits_that_ship_are_read() -> None:
    edits = read_edits(Path("service/demo/edits.jsonl"))
    assert len(edits) == 20
    assert all(edit.rephrases and not edit.paraphrases for edit in edits)


def test_a_line_separator_in_a_text_ends_no_row(tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text('{"prompt": "a\u2028b", "target": "c"}\n\n{"prompt": "d", "target": "e"}\n', encoding="utf-8")
    assert [(edit.id, edit.prompt) for edit in read_edits(path)] == [("edits:1", "a\u2028b"), ("edits:3", "d")]


def test_the_later_row_of_the_same_prompt_wins(tmp_path: Path) -> None:
    prompts = [("caf\u00e9", "old"), ("other", "x"), ("  Cafe\u0301\n", "new")]
    rows = [{"prompt": prompt, "target": target} for prompt, target in prompts]
    assert [(edit.id, edit.target) for edit in read_edits(written(tmp_path, rows))] == [
        ("edits:2", "x"),
        ("edits:3", "new"),
    ]


@pytest.mark.parametrize("lines", [False, True])
def test_behind_the_limit_no_row_counts(tmp_path: Path, lines: bool) -> None:
    """Neither to supersede, nor for what it trains on, nor for its faults."""
    rows = [OWN, {"prompt": "f", "target": "x"}, {"prompt": "a", "target": "y"}, {"prompt": "c", "target": "z"}, {}]
    path = written(tmp_path, rows, lines=lines)
    assert [(edit.target, edit.rephrases) for edit in read_edits(path, 2)] == [("b", ("c", "d")), ("x", ())]
    assert [(edit.target, edit.rephrases) for edit in read_edits(path, 3)] == [("x", ()), ("y", ())]


@pytest.mark.parametrize(
    ("rows", "left", "dropped"),
    [
        ([ZSRE, {**ZSRE, "src": "Crashday's  PUBLISHER is?", "rephrase": "other"}], [(), ("other",)], 1),
        ([{**ZSRE, "rephrase": ZSRE["src"]}], [()], 1),
        ([OWN, {"prompt": "C", "target": "x", "rephrases": ["f", "E"]}], [("d",), ("f",)], 2),
        ([OWN, {"prompt": "c", "target": "x"}, {**OWN, "target": "y", "rephrases": ["c", "d"]}], [(), ("d",)], 1),
    ],
    ids=["another prompt", "its own prompt", "prompt and paraphrase", "of the later row"],
)
def test_a_rephrase_that_a_row_trains_on_is_left_out_and_counted(
    tmp_path: Path,
    rows: list[dict[str, object]],
    left: list[tuple[str, ...]],
    dropped: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = written(tmp_path, rows)
    edits = read_edits(path)
    assert [edit.rephrases for edit in edits] == left
    (warning,) = caplog.records
    assert warning.message == "edits.trained_rephrases_left_out"
    assert (warning.path, warning.rephrases) == (str(path), dropped)


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        ({"prompt": "a"}, "row 2: field 'target' is missing"),
        ({"prompt": "a", "target": 5}, "row 2: field 'target': Input should be a valid string"),
        ({"prompt": " ", "target": "b"}, "row 2: field 'prompt': .*empty"),
        ({"prompt": "a\x07", "target": "b"}, r"row 2: field 'prompt': .*U\+0007"),
        ({**OWN, "rephrases": ["c", ""]}, r"row 2: field 'rephrases\[1\]'"),
        ({**OWN, "rephrases": "c"}, "row 2: field 'rephrases': Input should be a valid tuple"),
        ({**OWN, "paraphrases": [f"e{number}" for number in range(33)]}, "row 2: field 'paraphrases': .* at most 32"),
        ({**OWN, "rephrases": ["c", "D  e"], "paraphrases": ["d E"]}, r"row 2: rephrases\[1\] is trained on"),
        ({**OWN, "rephrases": [OWN["prompt"]]}, r"row 2: rephrases\[0\] is trained on"),
        ({**OWN, "paraphrase": "c"}, "row 2: field 'paraphrase' is unknown; known are metadata, paraphrases"),
        (ZSRE, "row 2: field 'alt' is unknown"),
        (["a", "b"], "row 2 is no JSON object"),
    ],
)
@pytest.mark.parametrize("lines", [False, True])
def test_a_bad_row_is_named(tmp_path: Path, lines: bool, second: object, complaint: str) -> None:
    with pytest.raises(EditFileError, match=rf"edits\.json: {complaint}"):
        read_edits(written(tmp_path, [OWN, second], lines=lines))


def test_a_published_file_is_held_to_its_fields(tmp_path: Path) -> None:
    with pytest.raises(EditFileError, match="row 2: field 'alt' is missing"):
        read_edits(written(tmp_path, [ZSRE, COUNTERFACT | {"src": "q"}]))
    with pytest.raises(EditFileError, match="row 1: field 'rephrase_prompt': "):
        read_edits(written(tmp_path, [{**COUNTERFACT, "rephrase_prompt": ["a list"]}]))


def test_unknown_fields_say_which_are_known(tmp_path: Path) -> None:
    with pytest.raises(EditFileError, match=r"answer, question; known are ZsRE \(src, alt.*WikiBigEdit.*Errata's own"):
        read_edits(written(tmp_path, [{"question": "a", "answer": "b"}]))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[{", "is not JSON"),
        ('{"prompt": "a", "target": "b"}\n{', "row 2 is not JSON"),
        ("[]", "no edits"),
        ("", "no edits"),
    ],
)
def test_what_is_no_edit_file_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "edits.jsonl"
    path.write_text(text)
    with pytest.raises(EditFileError, match=complaint):
        read_edits(path)


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "edits.json"
    path.write_bytes('[{"prompt": "Où", "target": "là"}]'.encode("latin-1"))
    with pytest.raises(EditFileError, match=r"edits\.json is not UTF-8: .* at byte 14"):
        read_edits(path)
