"""AnswerCheck: what nodes answer at a version is what they answered when the version was verified.

The read-back of slots compares the matrices; this compares what users get, through everything that lies between a
request's model name and its answer. One short request at a time.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.answers import STOP, matches
from service.errors import UnavailableError
from service.fleet import Fleet, Trouble
from service.metrics.catalogue import ANSWERS_CHECKED
from service.nodes import NodeClient, NodeRefusedError
from service.schemas import Edit, Format
from service.stores import Stores
from service.verification import tokens_for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """An edit that a version is known to answer right, and the format to ask it in."""

    version: int
    edit: Edit
    form: Format


class AnswerCheck:
    """Asks each node about its versions in turn, the active one first, one question every so many seconds."""

    def __init__(
        self,
        fleet: Fleet,
        stores: Stores,
        *,
        every_s: float,
        max_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._stores = stores
        self._every_s = every_s
        self._max_tokens = max_tokens
        self._clock = clock
        self._due: float | None = None
        self._asked: dict[str, set[int]] = {}

    def look(self) -> None:
        """Asks each serving node one question if it is time; one that does not answer is asked the next time."""
        now = self._clock()
        if not self._every_s or (self._due is not None and now < self._due):
            return
        self._due = now + self._every_s
        for node in self._fleet.serving():
            try:
                if question := self._next(node):
                    self._check(node, question)
            except (NodeRefusedError, UnavailableError) as error:
                log.warning("answer.not_checked", extra={"node": node.address, "reason": error.message})

    def trouble(self, node: NodeClient, version: int) -> Trouble | None:
        """What keeps the node from answering a question about the version right; None if nothing does."""
        question = self._question(version) if self._every_s else None
        try:
            if question is None or self._is_right(node, question):
                return None
        except (NodeRefusedError, UnavailableError) as error:
            return error
        return _refusal(node, version)

    def _next(self, node: NodeClient) -> Question | None:
        """A question about the next version in the node's slots that has one."""
        questions = {version: found for version in node.in_slots() if (found := self._question(version))}
        asked = self._asked.setdefault(node.address, set())
        if not questions.keys() - asked:
            asked.clear()
        pointer = self._stores.registry.active()
        active = pointer.active if pointer else None
        for version in sorted(questions.keys() - asked, key=lambda number: (number != active, number)):
            asked.add(version)
            return questions[version]
        return None

    def _question(self, version: int) -> Question | None:
        registry = self._stores.registry
        if not (known := registry.confident(version)):
            return None
        edits = self._stores.edits.by_sequence([random.choice(known)])  # noqa: S311 - not a secret
        form = random.choice(registry.get(version).formats)  # noqa: S311
        return Question(version, edits[0], form) if edits else None

    def _check(self, node: NodeClient, question: Question) -> None:
        if self._is_right(node, question):
            return
        trained = self._stores.registry.get(question.version).tensors
        self._stores.events.append(
            "node.answer_wrong", {"address": node.address, "version": question.version, "edit": question.edit.id}
        )
        if self._fleet.load_again(node, question.version, trained) and not self._is_right(node, question):
            self._fleet.eject(node, _refusal(node, question.version))

    def _is_right(self, node: NodeClient, question: Question) -> bool:
        edit, tokens = question.edit, tokens_for(question.edit, self._max_tokens)
        answer = node.ask(question.version, edit.prompt, question.form, max_tokens=tokens)
        right = matches(answer.text, edit.target, finished=answer.finish_reason == STOP)
        self._stores.measures.count(ANSWERS_CHECKED, "right" if right else "wrong")
        if not right:
            said = {"edit": edit.id, "format": question.form, "answered": answer.text[:200]}
            log.error("answer.wrong", extra={"node": node.address, "version": question.version, **said})
        return right


def _refusal(node: NodeClient, version: int) -> NodeRefusedError:
    return NodeRefusedError(
        f"node {node.address} does not answer at version {version} as it did when that was verified",
        code="wrong_answer",
    )
