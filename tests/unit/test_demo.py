"""The demo: its judgement, which must refuse every way of not being true, and its steps against a fake service."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest
from fake_service import FakeService
from rich.console import Console

from service.client import Answer, ClientError, ErrataClient
from service.demo.judgement import Evidence, Reading, objections
from service.demo.script import demo_settings, facts, run_demo
from service.errors import ConflictError, ErrataError
from service.schemas import EditState, Format, FormatOutcome, Trigger, normalise_text
from service.settings import Settings
from service.stack import Stack

FACTS = facts()


def state(index: int, *, status: str = "live", chat_matched: bool = True) -> EditState:
    outcome = FormatOutcome(matched=True, before="", after="", finish_reason="stop")
    verified = {Format.RAW: outcome, Format.CHAT: outcome.model_copy(update={"matched": chat_matched})}
    return EditState.model_validate(
        {
            "id": f"edit_{index}",
            "status": status,
            "version": 1,
            "verified": verified,
            "progress": None,
            "error": None,
            "updated_at": 0,
        }
    )


def reading(version: int) -> Reading:
    if version == 0:
        return [dict.fromkeys(Format, Answer("I do not know", 0, "length")) for _ in FACTS]
    return [dict.fromkeys(Format, Answer(fact.target, version, "stop")) for fact in FACTS]


def changed(before: Reading, index: int, form: Format, answer: Answer) -> Reading:
    return [{**answers, form: answer} if at == index else answers for at, answers in enumerate(before)]


TRUE = Evidence(
    facts=FACTS,
    states=[state(index) for index in range(20)],
    version=1,
    before=reading(0),
    after=reading(1),
    rolled_back=reading(0),
    again=reading(1),
)


def with_states(*states: EditState) -> Evidence:
    return replace(TRUE, states=[*states, *TRUE.states[len(states) :]])


def test_what_is_true_has_no_objection() -> None:
    assert objections(TRUE) == []


def test_one_edit_may_be_missed_and_then_its_answer_does_not_count() -> None:
    wrong = changed(TRUE.after, 0, Format.RAW, Answer("else", 1, "stop"))

    assert objections(replace(with_states(state(0, status="failed")), after=wrong, again=wrong)) == []


FALSE: dict[str, tuple[Evidence, str]] = {
    "two edits failed": (with_states(state(0, status="failed"), state(1, status="failed")), "18 of 20"),
    "two edits are verified in one format only": (
        with_states(state(0, chat_matched=False), state(1, chat_matched=False)),
        "18 of 20",
    ),
    "two edits are trained and not live": (with_states(state(0, status="trained"), state(1, status="held")), "18 of"),
    "a live edit is answered wrongly in chat": (
        replace(TRUE, after=(wrong := changed(TRUE.after, 3, Format.CHAT, Answer("else", 1, "stop"))), again=wrong),
        "(chat) is live and answered with 'else'",
    ),
    "a live edit is answered rightly and then on and on": (
        replace(
            TRUE,
            after=(longer := changed(TRUE.after, 3, Format.RAW, Answer(FACTS[3].target, 1, "length"))),
            again=longer,
        ),
        "(raw) is live and answered with",
    ),
    "the rollback restored one answer less": (
        replace(TRUE, rolled_back=changed(TRUE.before, 7, Format.CHAT, Answer("I do not", 0, "length"))),
        "after the rollback",
    ),
    "the rollback restored the text and not its end": (
        replace(TRUE, rolled_back=changed(TRUE.before, 7, Format.RAW, Answer("I do not know", 0, "stop"))),
        "after the rollback",
    ),
    "the rollback changed nothing": (replace(TRUE, rolled_back=TRUE.after), "rolled back: version 0 should have"),
    "activating again changed nothing": (replace(TRUE, again=TRUE.before), "again: version 1 should have answered"),
    "activating again gave another answer": (
        replace(TRUE, again=changed(TRUE.after, 19, Format.RAW, Answer("else", 1, "stop"))),
        "after activating again",
    ),
    "the base was not asked before": (replace(TRUE, before=TRUE.after, rolled_back=TRUE.after), "before: version 0"),
    "one answer came from another version": (
        replace(TRUE, after=changed(TRUE.after, 0, Format.RAW, Answer(FACTS[0].target, 2, "stop"))),
        "after: version 1 should have answered, not [1, 2]",
    ),
    "nothing was published": (
        replace(TRUE, version=0, after=TRUE.before, again=TRUE.before),
        "is live and answered with 'I do not know'",
    ),
}


@pytest.mark.parametrize("name", FALSE)
def test_what_is_not_true_is_refused(name: str) -> None:
    evidence, objection = FALSE[name]

    assert any(objection in found for found in objections(evidence))


def test_the_facts_are_twenty_plain_and_distinct() -> None:
    assert [fact.metadata["origin"] for fact in FACTS] == ["ZsRE"] * 10 + ["CounterFact"] * 10
    assert len({normalise_text(fact.prompt) for fact in FACTS}) == 20
    assert all((fact.prompt + fact.target).isascii() and len(fact.target.split()) <= 3 for fact in FACTS)
    assert all(fact.rephrases for fact in FACTS)


@dataclass
class FakeStack:
    """Notes what was done to it."""

    code: int = 0
    up_now: bool = False
    done: list[str] = field(default_factory=list)

    def running(self) -> bool:
        return self.up_now

    def up(self, *, detach: bool, say: Callable[[str], None]) -> int:
        assert detach
        self.done.append("up")
        self.up_now = self.code == 0
        return self.code

    def down(self, *, say: Callable[[str], None]) -> None:
        self.done.append("down")
        self.up_now = False

    def url(self) -> str:
        return "http://fake"


def demo(service: FakeService, stack: FakeStack, home: Path) -> tuple[int, str]:
    console = Console(width=150, markup=False, highlight=False)
    with console.capture() as captured:
        code = run_demo(
            Settings(home=home),
            console,
            stack_of=lambda _: stack,
            client_of=lambda url: ErrataClient(url, transport=httpx.MockTransport(service)),
        )
    return code, captured.get()


def test_the_demo_shows_everything_and_stops_what_it_started(tmp_path: Path) -> None:
    stack = FakeStack()

    code, output = demo(FakeService(), stack, tmp_path)

    assert code == 0
    assert stack.done == ["up", "down"]
    assert "20 of 20 corrections are live" in output
    assert output.count("= Cinematronics") == 4
    assert "of the run: training" in output
    assert "rollback, the call" in output


def test_a_demo_that_is_not_true_says_so_and_exits_1(tmp_path: Path) -> None:
    forgot: list[int] = []

    def answer(prompt: str, version: int, chat: bool) -> str | None:
        forgot.append(version)
        return "another" if version == 0 and 1 in forgot and prompt == FACTS[0].prompt else None

    code, output = demo(FakeService(answer=answer), FakeStack(), tmp_path)

    assert code == 1
    assert "NOT TRUE: after the rollback, " in output


def test_edits_that_fail_are_not_called_live(tmp_path: Path) -> None:
    service = FakeService(ends={fact.prompt: "failed" for fact in FACTS[:2]})

    code, output = demo(service, FakeStack(), tmp_path)

    assert code == 1
    assert "NOT TRUE: 18 of 20 edits are live" in output


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), httpx.ConnectError("gone")])
def test_the_stack_is_stopped_whatever_happens(failure: BaseException, tmp_path: Path) -> None:
    def answer(prompt: str, version: int, chat: bool) -> str | None:
        raise failure

    stack = FakeStack()
    with pytest.raises((KeyboardInterrupt, ClientError)):
        demo(FakeService(answer=answer), stack, tmp_path)

    assert stack.done == ["up", "down"]


def test_a_stack_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ErrataError, match="did not start"):
        demo(FakeService(), FakeStack(code=1), tmp_path)


def test_a_demo_that_runs_already_is_left_alone(tmp_path: Path) -> None:
    stack = FakeStack(up_now=True)
    kept = tmp_path / "demo" / "stack.json"
    kept.parent.mkdir()
    kept.touch()

    with pytest.raises(ConflictError, match="a demo runs already"):
        demo(FakeService(), stack, tmp_path)

    assert stack.done == []
    assert kept.exists()


def test_the_demo_starts_from_nothing_and_touches_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "old").touch()
    (tmp_path / "mine").touch()

    demo(FakeService(), FakeStack(), tmp_path)

    assert not (tmp_path / "demo" / "old").exists()
    assert (tmp_path / "mine").exists()


def test_the_demo_uses_nothing_that_runs_elsewhere(tmp_path: Path) -> None:
    mine = Settings(
        home=tmp_path,
        redis_url="redis://production/0",
        store="s3://production",
        nodes=("http://production",),
        port=8000,
        trigger=Trigger.MANUAL,
    )

    own = demo_settings(mine)

    assert (own.redis_url, own.nodes, own.port, own.trigger) == ("", (), 0, Trigger.IMMEDIATE)
    assert own.store_url == str(tmp_path / "demo" / "versions")
    assert not Stack(own).running()
