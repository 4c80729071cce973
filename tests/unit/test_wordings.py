import pytest

from worker.edit_files import EditRow
from worker.training.encode import TrainingEdit
from worker.wordings import untrained_rephrases, without_contradicted


def test_a_rephrase_that_an_edit_of_the_set_trains_on_is_left_out() -> None:
    edits = [
        EditRow("a", "One", "1", rephrases=("b", " TWO", "own"), paraphrases=("own",)),
        EditRow("b", "two", "2", rephrases=("one", "three"), paraphrases=("B",)),
    ]
    assert untrained_rephrases(edits) == [(), ("three",)]


@pytest.mark.parametrize(
    ("edits", "left"),
    [
        pytest.param(
            [TrainingEdit("old", "p", "x", ("c", "d")), TrainingEdit("new", "q", "y", ("C ", "e"))],
            [("d",), ("C ", "e")],
            id="of two paraphrases the newer edit's stays",
        ),
        pytest.param(
            [TrainingEdit("old", "p", "x", ("q",)), TrainingEdit("new", "Q", "y")],
            [(), ()],
            id="a newer prompt stays",
        ),
        pytest.param(
            [TrainingEdit("old", "p", "x"), TrainingEdit("new", "q", "y", ("P", "c"))],
            [(), ("c",)],
            id="an older prompt stays too",
        ),
        pytest.param(
            [TrainingEdit("old", "p", "x", ("q", "c")), TrainingEdit("new", "q", "x", ("c", "p"))],
            [("q", "c"), ("c", "p")],
            id="the same target is no contradiction",
        ),
        pytest.param(
            [TrainingEdit(name, name, target, ("c",)) for name, target in [("k", "x"), ("l", "y"), ("m", "x")]],
            [("c",), (), ("c",)],
            id="of three the newest decides",
        ),
    ],
)
def test_no_wording_is_trained_with_two_targets(edits: list[TrainingEdit], left: list[tuple[str, ...]]) -> None:
    kept = without_contradicted(edits)
    assert [edit.paraphrases for edit in kept] == left
    assert [(edit.id, edit.prompt, edit.target) for edit in kept] == [
        (edit.id, edit.prompt, edit.target) for edit in edits
    ]


def test_both_edits_of_a_contradiction_are_named(caplog: pytest.LogCaptureFixture) -> None:
    without_contradicted([TrainingEdit("old", "p", "x", ("c", "d")), TrainingEdit("new", "d", "y")])
    (record,) = caplog.records
    assert record.message == "edits.contradicted_paraphrase_left_out"
    assert (record.edit, record.paraphrase, record.contradicted_by) == ("old", 1, "new")
