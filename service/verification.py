"""Asks nodes, at a version's own name, the prompts that the version must answer, while users still get the old one."""

import itertools
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from opentelemetry.context import attach, get_current

from service.answers import STOP, matches
from service.nodes import Answer, NodeClient, NodeRefusedError
from service.schemas import Edit, Format, FormatOutcome

_CONCURRENCY = 16
# Room for a wrong answer to show itself; a right one has at most one token for each byte, and its end.
_SPARE_TOKENS = 8
# What else is in the batch moves a log-probability by some tenths in bfloat16.
_CONFIDENT_MARGIN_NATS = 1.0


@dataclass(frozen=True)
class Verdict:
    """How nodes answered a version's edits, and what follows for the version.

    Attributes:
        outcomes: by edit id, for the new edits.
        reasons: why the version must not become active; empty if it may.
        confident: ids of edits, the new ones if any, that were answered right in every format and by a margin.
    """

    outcomes: Mapping[str, Mapping[Format, FormatOutcome]]
    reasons: Sequence[str]
    confident: Sequence[str]


@dataclass(frozen=True)
class Asked:
    """How a node answered an edit in one format, and by what margin, in nats (``nodes.Answer.margin``)."""

    outcome: FormatOutcome
    margin: float


@dataclass(frozen=True)
class Demand:
    """What the settings demand of a version.

    Attributes:
        min_new: least share of its new edits that must match in every format.
        min_kept: least share of the older edits asked again that must.
    """

    min_new: float
    min_kept: float


def verify(
    nodes: Sequence[NodeClient],
    *,
    version: int,
    active: int,
    new: Sequence[Edit],
    older: Sequence[Edit],
    formats: Sequence[Format],
    demand: Demand,
    max_tokens: int,
) -> Verdict:
    """Asks the new edits at both versions and the older ones at the candidate, greedily.

    Args:
        nodes: who is asked, in turn; all hold the candidate.
        version: the candidate.
        active: the version that users get now, for the answers before.
        new: edits that the candidate adds.
        older: edits that were live before and must still be.
        formats: the formats trained.
        demand: what suffices.
        max_tokens: length that no target exceeds.

    Raises:
        UnavailableError: a node stopped answering.
    """

    def asked(edit: Edit, node: NodeClient, before: int | None) -> dict[Format, Asked]:
        tokens = tokens_for(edit, max_tokens)
        return {form: _ask(node, edit, form, tokens, version=version, before=before) for form in formats}

    # The threads belong to the caller's trace.
    with ThreadPoolExecutor(_CONCURRENCY, initializer=attach, initargs=(get_current(),)) as pool:
        of_new = list(pool.map(lambda edit, node: asked(edit, node, active), new, itertools.cycle(nodes)))
        of_older = list(pool.map(lambda edit, node: asked(edit, node, None), older, itertools.cycle(nodes)))
    shortfalls = (_shortfall("new", of_new, demand.min_new), _shortfall("older", of_older, demand.min_kept))
    return Verdict(
        outcomes={
            edit.id: {form: one.outcome for form, one in found.items()} for edit, found in zip(new, of_new, strict=True)
        },
        reasons=[reason for reason in shortfalls if reason],
        # Only the new ones tell a version from the one before.
        confident=_confident(new, of_new) or _confident(older, of_older),
    )


def tokens_for(edit: Edit, max_tokens: int) -> int:
    """How long an answer to the edit may become, a wrong one included."""
    return min(max_tokens, len(edit.target.encode())) + _SPARE_TOKENS


def sample(edits: Sequence[Edit], size: int, *, seed: int) -> list[Edit]:
    """At most ``size`` of the edits, the same ones for the same seed."""
    return random.Random(seed).sample(list(edits), min(size, len(edits)))  # noqa: S311 - not a secret


def _confident(edits: Sequence[Edit], found: Sequence[Mapping[Format, Asked]]) -> list[str]:
    return [
        edit.id
        for edit, by_form in zip(edits, found, strict=True)
        if by_form and all(one.outcome.matched and one.margin >= _CONFIDENT_MARGIN_NATS for one in by_form.values())
    ]


def _ask(node: NodeClient, edit: Edit, form: Format, tokens: int, *, version: int, before: int | None) -> Asked:
    earlier = None if before is None else _answer(node, before, edit, form, tokens)
    after = _answer(node, version, edit, form, tokens)
    outcome = FormatOutcome(
        matched=matches(after.text, edit.target, finished=after.finish_reason == STOP),
        before=earlier.text.strip() if earlier else None,
        after=after.text.strip(),
        finish_reason=after.finish_reason,
    )
    return Asked(outcome, after.margin)


def _answer(node: NodeClient, version: int, edit: Edit, form: Format, tokens: int) -> Answer:
    try:
        return node.ask(version, edit.prompt, form, max_tokens=tokens)
    except NodeRefusedError as error:
        # The edit's own fault (too long with the chat template, say); the others are judged by themselves.
        return Answer(error.message, error.code)


def _shortfall(name: str, group: Sequence[Mapping[Format, Asked]], least: float) -> str | None:
    matched = sum(all(one.outcome.matched for one in by_form.values()) for by_form in group)
    if not group or matched / len(group) >= least:
        return None
    return f"{matched} of {len(group)} {name} edits answered right; the least share is {least:g}"
