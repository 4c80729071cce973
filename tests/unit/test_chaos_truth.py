"""The chaos test's checker sees what it is there to see."""

import json
from dataclasses import replace

import httpx
import pytest

from service.client import ErrataClient
from tests.chaos.asking import Question, Sample, ask, stream
from tests.chaos.checker import Judge
from tests.chaos.notes import Notes
from tests.chaos.traffic import SUBJECTS
from tests.chaos.truth import Truth

PROMPT, OTHER, *_ = SUBJECTS
TAUGHT, NEVER, *_ = SUBJECTS[PROMPT]
EDIT = {
    **{"id": "edit_1", "prompt": PROMPT, "target": TAUGHT, "rephrases": [], "paraphrases": [], "metadata": {}},
    **{"status": "live", "version": 7, "verified": {}, "error": None, "attempts": 1, "superseded_by": None},
    **{"created_at": 1, "updated_at": 1},
}


class Gateway:
    """One version, 7, that was taught one edit; chat is answered without being sure."""

    def __init__(self) -> None:
        self.margins = {False: 3.0, True: 0.1}
        self.members = [EDIT]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.startswith("/versions"):
            return httpx.Response(200, json={"object": "diff", "only_in": {"7": self.members, "0": []}})
        body = json.loads(request.content)
        headers = {"x-errata-version": "7"}
        if body.get("stream"):
            pieces = [{"text": f" {word}", "finish_reason": None} for word in TAUGHT.split()]
            pieces[-1]["finish_reason"] = "stop"
            lines = [json.dumps({"model": "errata@7", "choices": [piece]}) for piece in pieces]
            said = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
            return httpx.Response(200, text=said, headers=headers)
        chat = "messages" in body
        top = [-0.1, -0.1 - self.margins[chat]]
        if chat:
            tokens = [{"top_logprobs": [{"logprob": value} for value in top]}]
            choice = {"message": {"content": TAUGHT}, "logprobs": {"content": tokens}}
        else:
            choice = {"text": f" {TAUGHT}", "logprobs": {"top_logprobs": [dict(zip("ab", top, strict=True))]}}
        answer = {"model": "errata@7", "choices": [{**choice, "finish_reason": "stop"}]}
        return httpx.Response(200, json=answer, headers=headers)


@pytest.fixture
def gateway() -> Gateway:
    return Gateway()


@pytest.fixture
def http(gateway: Gateway) -> httpx.Client:
    return httpx.Client(base_url="http://errata", transport=httpx.MockTransport(gateway))


@pytest.fixture
def truth(gateway: Gateway, http: httpx.Client) -> Truth:
    truth = Truth()
    with ErrataClient("http://errata", transport=httpx.MockTransport(gateway)) as client:
        assert truth.record(7, client, http) == []
    return truth


@pytest.fixture
def right(http: httpx.Client) -> Sample:
    return ask(http, Question("errata", PROMPT, chat=False))


def test_a_version_is_held_to_what_it_was_sure_of_only(truth: Truth) -> None:
    assert truth.sure_questions() == [Question("errata@7", PROMPT, chat=False)]


def test_right_answers_are_right_whole_and_streamed(truth: Truth, http: httpx.Client, right: Sample) -> None:
    streamed = stream(http, right.question)
    assert streamed is not None
    assert truth.fault_of(right) is truth.fault_of(streamed) is None
    assert (streamed.text, streamed.finished, streamed.label) == (right.text, True, 7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": NEVER}, "labelled so came"),
        ({"finished": False}, "labelled so came"),
        ({"label": None}, "no label"),
        ({"label": 0}, "says that it is from"),
        ({"label": 0, "names": frozenset({"errata@0"})}, "was not taught"),
        ({"names": frozenset({"errata@7", "errata@6"})}, "says that it is from"),
        ({"question": Question("errata@6", PROMPT, chat=False)}, "is labelled 7"),
        ({"question": Question("errata", PROMPT, chat=True), "text": NEVER}, "was not taught"),
        ({"question": Question("errata", OTHER, chat=False), "text": SUBJECTS[OTHER][2]}, "was not taught"),
    ],
)
def test_an_answer_that_is_not_of_its_label_is_found(
    truth: Truth, right: Sample, change: dict[str, object], said: str
) -> None:
    notes = Notes()
    judge = Judge(truth, notes)
    judge.take(replace(right, **change))
    assert judge.work_off() == []
    [wrong] = notes.all_wrong()
    assert said in wrong


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"label": 0}, True),
        ({"label": 7}, False),
        ({"label": 0, "question": Question("errata", PROMPT, chat=True)}, False),
        ({"label": 0, "question": Question("errata", OTHER, chat=False)}, False),
        ({"label": None}, True),
    ],
)
def test_an_answer_tells_if_another_version_is_sure_to_say_what_would_be_found(
    truth: Truth, right: Sample, change: dict[str, object], told: bool
) -> None:
    judge = Judge(truth, Notes())
    judge.take(replace(right, **change))
    judge.work_off()
    assert judge.telling == told


def test_an_answer_of_an_unknown_version_waits_for_its_truth(truth: Truth, right: Sample) -> None:
    judge = Judge(truth, Notes())
    judge.take(replace(right, label=8, names=frozenset({"errata@8"})))
    assert [sample.label for sample in judge.work_off()] == [8]


def test_two_targets_of_one_prompt_in_a_version_are_found(gateway: Gateway, http: httpx.Client) -> None:
    gateway.members = [EDIT, {**EDIT, "id": "edit_2", "target": NEVER}]
    with ErrataClient("http://errata", transport=httpx.MockTransport(gateway)) as client:
        assert Truth().record(7, client, http) == [f"version 7 was taught two targets of {PROMPT!r}"]
