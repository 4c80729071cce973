"""The demo's steps: start, ask, submit, wait, ask, roll back, ask, activate, ask, judge, stop."""

import shutil
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Protocol, TypeVar

from pydantic import SecretStr
from rich.console import Console

from service.client import Answer, ErrataClient
from service.console import Follow
from service.demo.judgement import Evidence, Reading, is_live, objections
from service.demo.report import answers_table, timings
from service.demo.timed import Timed
from service.errors import ConflictError, ErrataError
from service.schemas import EditRequest, Format, Run, RunStatus, Trigger
from service.settings import Settings
from service.stack import Stack

T = TypeVar("T")

# Longer than every target; a base model that rambles is cut, the same way each time.
_MAX_TOKENS = 24
_AT_REST_WITHIN_S = 3600.0


class StackLike(Protocol):
    """What the demo needs of a stack."""

    def running(self) -> bool:
        """Whether it runs."""

    def up(self, *, detach: bool, say: Callable[[str], None]) -> int:
        """Starts it."""

    def down(self, *, say: Callable[[str], None]) -> None:
        """Stops it."""

    def url(self) -> str:
        """Where it answers."""


def facts() -> list[EditRequest]:
    """The 20 corrections: 10 of ZsRE, 10 of CounterFact."""
    lines = files("service.demo").joinpath("edits.jsonl").read_text(encoding="utf-8").splitlines()
    return [EditRequest.model_validate_json(line) for line in lines]


def demo_settings(settings: Settings) -> Settings:
    """The settings with a home, a port and parts of the demo's own; nothing that runs elsewhere is touched."""
    return settings.model_copy(
        update={
            "home": settings.home.absolute() / "demo",
            "host": "127.0.0.1",
            "port": 0,
            "redis_url": "",
            "store": "",
            "nodes": (),
            "node_token": SecretStr(""),
            "node_cache": "",
            "trigger": Trigger.IMMEDIATE,
        }
    )


def run_demo(
    settings: Settings,
    console: Console,
    *,
    stack_of: Callable[[Settings], StackLike] = Stack,
    client_of: Callable[[str], ErrataClient] = ErrataClient,
) -> int:
    """Runs the whole demo; returns 0 only if every claim held. Stops what it started, whatever happens.

    Raises:
        ConflictError: a demo runs already under this home.
        ErrataError: the stack does not start.
    """
    own = demo_settings(settings)
    stack = stack_of(own)
    if stack.running():
        raise ConflictError(f"a demo runs already; `errata down --home {own.home}` stops it")
    if own.home.exists():
        shutil.rmtree(own.home)
    _step(console, f"Starting a stack of its own under {own.home}")
    try:
        if stack.up(detach=True, say=console.print) or not stack.running():
            raise ErrataError("the stack did not start")
        with client_of(stack.url()) as client:
            evidence = _show(client, console)
    finally:
        _step(console, "Stopping everything that the demo started")
        stack.down(say=console.print)
    return _conclude(evidence, console)


def _show(client: ErrataClient, console: Console) -> Evidence:
    wanted = facts()
    _step(console, f"Asking the base model all {len(wanted)} questions, raw and through the chat template")
    before = _ask_all(client, wanted)

    _step(console, f"Submitting {len(wanted)} corrections and waiting until the served model says them")
    edits = client.submit_batch(wanted)
    acknowledged = time.monotonic()
    with Follow(console) as follow:
        states = client.wait((edit.id for edit in edits), timeout_s=_AT_REST_WITHIN_S, on_change=follow)
    live_at = [at - acknowledged for (_, status), at in follow.seen_at.items() if status == "live"]
    version = client.health().active or 0

    _step(console, f"Asking again: version {version} answers")
    after = _ask_all(client, wanted)

    _step(console, "Rolling back to version 0, the base model, and asking again")
    began = time.monotonic()
    _, rollback_s = _timed(lambda: client.rollback(0))
    _ask(client, wanted[0], Format.RAW)
    first_answer_s = time.monotonic() - began
    rolled_back = _ask_all(client, wanted)

    _step(console, f"Activating version {version} again and asking again")
    _, activate_s = _timed(lambda: client.activate(version))
    again = _ask_all(client, wanted)

    evidence = Evidence(
        facts=wanted,
        states=[states[edit.id] for edit in edits],
        version=version,
        before=before,
        after=after,
        rolled_back=rolled_back,
        again=again,
    )
    timed = Timed(
        first_live_s=min(live_at, default=None),
        all_live_s=max(live_at, default=None),
        rollback_s=rollback_s,
        first_answer_s=first_answer_s,
        activate_s=activate_s,
    )
    for form in Format:
        _step(console, f"Answers, {'raw completion' if form is Format.RAW else 'chat'}")
        console.print(answers_table(evidence, form))
    _step(console, "Timings")
    console.print(timings(timed, _successful(client, version)))
    return evidence


def _conclude(evidence: Evidence, console: Console) -> int:
    found = objections(evidence)
    live = sum(is_live(state) for state in evidence.states)
    _step(console, "Verdict")
    for objection in found:
        console.print(f"NOT TRUE: {objection}")
    if found:
        console.print(f"{len(found)} claims did not hold.")
        return 1
    count = len(evidence.facts)
    console.print(f"{live} of {count} corrections are live, verified and answered in both formats.")
    console.print(f"The rollback restored all {count} answers of the base model, word for word, in both formats.")
    console.print(f"Activated again, version {evidence.version} gave the same answers as before the rollback.")
    return 0


def _ask_all(client: ErrataClient, wanted: Sequence[EditRequest]) -> Reading:
    # One at a time: in bf16 the composition of a batch can decide a near-tie between two tokens.
    return [{form: _ask(client, fact, form) for form in Format} for fact in wanted]


def _ask(client: ErrataClient, fact: EditRequest, form: Format) -> Answer:
    return client.ask(fact.prompt, chat=form is Format.CHAT, max_tokens=_MAX_TOKENS)


def _successful(client: ErrataClient, version: int) -> Run | None:
    runs = client.runs().data
    return next((run for run in runs if run.version == version and run.status is RunStatus.SUCCEEDED), None)


def _timed(act: Callable[[], T]) -> tuple[T, float]:
    began = time.monotonic()
    result = act()
    return result, time.monotonic() - began


def _step(console: Console, title: str) -> None:
    console.print(f"\n== {title}")
