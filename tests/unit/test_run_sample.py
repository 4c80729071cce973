"""What a run measures: which older edits beside its new ones, and by which rephrases."""

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from service.settings import Settings
from service.store import Claim
from worker.evaluation.metrics import EvaluationEdit
from worker.run import Trainer

EDITS = [
    SimpleNamespace(id=f"edit_{number}", prompt="a", target="b", rephrases=["c"], paraphrases=[])
    for number in range(40)
]
NEWEST = {"edit_38", "edit_39"}


def measured(run_id: str, *, new: set[str] = NEWEST, sample: int = 6) -> list[str]:
    return [edit.id for edit in evaluated(EDITS, run_id, new=new, sample=sample)]


def evaluated(edits: Sequence[Any], run_id: str, *, new: set[str], sample: int) -> list[EvaluationEdit]:
    asked: list[EvaluationEdit] = []

    def evaluate(edits: list[EvaluationEdit], _: object) -> None:
        asked.extend(edits)

    played: Any = SimpleNamespace(evaluate=evaluate)
    settings = Settings(evaluate_sample=sample)
    trainer = Trainer(played, played, played, played, played, settings, threading.Event())
    run: Any = SimpleNamespace(id=run_id)
    trainer._evaluate(run, Claim(list(edits), sorted(new)), {})
    return asked


def test_the_new_edits_are_measured_and_some_of_the_others_whatever_their_age() -> None:
    runs = [measured(f"run_{number}") for number in range(30)]
    assert all(asked[:2] == ["edit_38", "edit_39"] and len(set(asked)) == 8 for asked in runs)
    assert {name for asked in runs for name in asked} == {edit.id for edit in EDITS}


def test_a_run_measures_the_same_ones_for_each_of_its_candidates() -> None:
    assert measured("run_1") == measured("run_1")
    assert measured("run_1", new={"edit_39"})[1:] != measured("run_2", new={"edit_39"})[1:]


def test_there_may_be_fewer_than_are_asked_for_and_one_is_asked_where_nothing_is_new() -> None:
    assert sorted(measured("run_1", sample=100)) == sorted(edit.id for edit in EDITS)
    assert measured("run_1", sample=0) == ["edit_38", "edit_39"]
    assert len(measured("run_1", new=set(), sample=0)) == 1


def test_a_rephrase_that_any_member_of_the_set_trains_on_is_not_asked() -> None:
    """Even one that is not measured itself."""
    edits = [
        SimpleNamespace(id="old", prompt="Who  LEADS it?", target="a", rephrases=[], paraphrases=["Its chief?"]),
        SimpleNamespace(
            id="new", prompt="x", target="b", rephrases=["who leads it?", "its chief?", "its leader?"], paraphrases=[]
        ),
    ]
    (asked,) = evaluated(edits, "run_1", new={"new"}, sample=0)
    assert (asked.id, asked.rephrases) == ("new", ("its leader?",))
