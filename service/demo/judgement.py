"""Whether what the demo showed is true. Pure: it judges answers that were given, and asks nobody."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from service.answers import STOP, matches
from service.client import Answer
from service.schemas import EditRequest, EditState, EditStatus, Format

MOST_MISSED = 1
"""Edits of the demo that need not become live."""

Reading = Sequence[Mapping[Format, Answer]]
"""The answers to all prompts, in the facts' order, by format."""


@dataclass(frozen=True)
class Evidence:
    """Everything that the demo's claims rest on.

    Attributes:
        facts: what was submitted.
        states: where each edit came to rest, in the facts' order.
        version: the version that was active then.
        before: answers of the base model.
        after: answers of the version, once the edits were at rest.
        rolled_back: answers after the rollback to version 0.
        again: answers after the version was activated again.
    """

    facts: Sequence[EditRequest]
    states: Sequence[EditState]
    version: int
    before: Reading
    after: Reading
    rolled_back: Reading
    again: Reading


def is_live(state: EditState) -> bool:
    """Whether an edit is live, and a node answered it rightly in every format before that."""
    return state.status is EditStatus.LIVE and all(
        form in state.verified and state.verified[form].matched for form in Format
    )


def objections(evidence: Evidence) -> list[str]:
    """Every claim that did not hold, in words; empty if all did."""
    return [
        *_not_live(evidence),
        *_wrong_version("before", evidence.before, 0),
        *_wrong_version("after", evidence.after, evidence.version),
        *_wrong_version("rolled back", evidence.rolled_back, 0),
        *_wrong_version("again", evidence.again, evidence.version),
        *_wrong_answers(evidence),
        *_different("after the rollback", evidence, evidence.before, evidence.rolled_back),
        *_different("after activating again", evidence, evidence.after, evidence.again),
    ]


def _not_live(evidence: Evidence) -> Iterator[str]:
    live = sum(is_live(state) for state in evidence.states)
    if live < (wanted := len(evidence.facts) - MOST_MISSED):
        yield f"{live} of {len(evidence.facts)} edits are live and verified in both formats; at least {wanted} must be"


def _wrong_version(name: str, reading: Reading, version: int) -> Iterator[str]:
    found = {answer.version for answers in reading for answer in answers.values()}
    if found != {version}:
        yield f"{name}: version {version} should have answered, not {sorted(found)}"


def _wrong_answers(evidence: Evidence) -> Iterator[str]:
    for fact, state, answers in zip(evidence.facts, evidence.states, evidence.after, strict=True):
        if not is_live(state):
            continue
        for form in Format:
            answer = answers[form]
            if not matches(answer.text, fact.target, finished=answer.finish_reason == STOP):
                yield f"{fact.prompt!r} ({form}) is live and answered with {answer.text!r}, not {fact.target!r}"


def _different(when: str, evidence: Evidence, expected: Reading, found: Reading) -> Iterator[str]:
    for fact, left, right in zip(evidence.facts, expected, found, strict=True):
        for form in Format:
            if _said(left[form]) != _said(right[form]):
                yield f"{when}, {fact.prompt!r} ({form}) is answered with {right[form].text!r}, not {left[form].text!r}"


def _said(answer: Answer) -> tuple[str, str]:
    return answer.text, answer.finish_reason
