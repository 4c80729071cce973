"""What each version must answer: recorded when it is first seen; later answers with its label are held to it."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import httpx

from service.answers import matches
from service.client import ErrataClient
from service.schemas import normalise_text
from tests.chaos.asking import Question, Sample, ask
from tests.chaos.traffic import SUBJECTS

# Between the best token and the next one, in nats: no arithmetic of a mixed batch bridges it.
_SURE = 0.5


@dataclass(frozen=True)
class _Version:
    """By prompt, the target of the version's edit; and the questions (prompt, chat) that it is sure to answer so."""

    targets: Mapping[str, str]
    sure: frozenset[tuple[str, bool]]


class Truth:
    """What is known of the versions that were recorded.

    A version's edit set says what it was taught; what it is held to is the part that its own first answers show it
    learned, with a margin. A prompt that it was not taught must not have any of that prompt's targets as its answer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._versions: dict[int, _Version] = {0: _Version({}, frozenset())}

    def known(self) -> list[int]:
        with self._lock:
            return list(self._versions)

    def record(self, version: int, client: ErrataClient, http: httpx.Client) -> list[str]:
        """Asks a version what it was taught; returns what is wrong with it. Raises ClientError."""
        wrong: list[str] = []
        targets: dict[str, str] = {}
        for edit in client.diff(version, 0).only_in[str(version)]:
            if targets.setdefault(edit.prompt, edit.target) != edit.target:
                wrong.append(f"version {version} was taught two targets of {edit.prompt!r}")
        sure = set()
        for prompt, target in targets.items():
            for chat in (False, True):
                sample = ask(http, Question(f"errata@{version}", prompt, chat), margin=True)
                right = matches(sample.text, target, finished=sample.finished)
                if right and (sample.margin or 0) > _SURE:
                    sure.add((prompt, chat))
        with self._lock:
            self._versions[version] = _Version(targets, frozenset(sure))
        return wrong

    def sure_questions(self) -> list[Question]:
        """Everything that versions are held to."""
        with self._lock:
            versions = dict(self._versions)
        return [
            Question(f"errata@{number}", prompt, chat)
            for number, version in versions.items()
            for prompt, chat in sorted(version.sure)
        ]

    def fault_of(self, sample: Sample) -> str | None:
        """What is wrong with an answer; None if nothing is. KeyError if its version is not recorded yet."""
        asked, label = sample.question, sample.label
        if label is None:
            return f"an answer to {asked} has no label"
        if asked.model not in {"errata", f"errata@{label}"}:
            return f"an answer to {asked} is labelled {label}"
        if sample.names != {f"errata@{label}"}:
            return f"an answer labelled {label} says that it is from {sorted(sample.names)}"
        with self._lock:
            version = self._versions[label]
        return _contradiction(version, sample)

    def tells_apart(self, sample: Sample) -> bool:
        """Whether what another recorded version is sure to say would have been found under this answer's label."""
        asked = sample.question
        with self._lock:
            versions = dict(self._versions)
        labelled = versions.pop(sample.label) if sample.label is not None else _Version({}, frozenset())
        said = {other.targets[asked.prompt] for other in versions.values() if (asked.prompt, asked.chat) in other.sure}
        return any(_contradiction(labelled, replace(sample, text=text, finished=True)) for text in said)


def _contradiction(version: _Version, sample: Sample) -> str | None:
    """What in an answer cannot come from the version that it is labelled with."""
    asked, said = sample.question, normalise_text(sample.text)
    target = version.targets.get(asked.prompt)
    if target is not None and (asked.prompt, asked.chat) in version.sure:
        if matches(sample.text, target, finished=sample.finished):
            return None
        return f"version {sample.label} answers {asked} with {target!r}; labelled so came {sample.text!r}"
    others = {normalise_text(other) for other in SUBJECTS[asked.prompt] if other != target}
    if sample.finished and said in others:
        return f"version {sample.label} was not taught {sample.text!r} for {asked}; labelled so it came"
    return None
