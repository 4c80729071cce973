"""Asks all the time, and holds every answer to the recorded truth of the version that it is labelled with."""

import threading
from collections import Counter
from random import Random

import httpx

from service.client import ErrataClient
from tests.chaos.asking import Question, Sample, ask, served, stream
from tests.chaos.notes import Loop, Notes
from tests.chaos.traffic import SUBJECTS
from tests.chaos.truth import Truth

_TIMEOUT_S = 60.0
_RECENT = 6


class Judge:
    """Holds answers to the truth, as soon as there is one for their version."""

    def __init__(self, truth: Truth, notes: Notes) -> None:
        self.truth = truth
        self._notes = notes
        self._lock = threading.Lock()
        self._waiting: list[Sample] = []
        self.judged: Counter[int] = Counter()
        """Answers by version."""
        self.telling = 0
        """Of them those that another version would not have given unseen."""

    def take(self, sample: Sample) -> None:
        """Judges an answer now or later."""
        with self._lock:
            self._waiting.append(sample)

    def work_off(self) -> list[Sample]:
        """Judges what can be judged; returns the rest."""
        known = set(self.truth.known())
        with self._lock:
            ripe = [sample for sample in self._waiting if sample.label is None or sample.label in known]
            self._waiting = [sample for sample in self._waiting if not (sample.label is None or sample.label in known)]
            rest = list(self._waiting)
        for sample in ripe:
            self.judged[-1 if sample.label is None else sample.label] += 1
            self.telling += self.truth.tells_apart(sample)
            if fault := self.truth.fault_of(sample):
                self._notes.wrong(fault)
        return rest


class Asker(Loop):
    """A user: asks for the active version, or by name for a recent one; raw and in chat, whole and streamed."""

    def __init__(self, url: str, judge: Judge, notes: Notes, random: Random, *, every_s: float) -> None:
        super().__init__(notes, every_s=every_s)
        self._url = url
        self._judge = judge
        self._random = random

    def step(self) -> None:
        """One question."""
        draw = self._random
        model = "errata"
        if draw.random() < 0.3:
            model = f"errata@{draw.choice(sorted(self._judge.truth.known())[-_RECENT:])}"
        question = Question(model, draw.choice(list(SUBJECTS)), draw.random() < 0.4)
        with httpx.Client(base_url=self._url, timeout=_TIMEOUT_S) as http:
            sample = stream(http, question) if draw.random() < 0.4 else ask(http, question)
        if sample is None:
            self.notes.count("streams that broke")
        else:
            self._judge.take(sample)


class Recorder(Loop):
    """Records each version soon after it can be asked for, and judges what waited for it."""

    def __init__(self, url: str, judge: Judge, notes: Notes, *, every_s: float) -> None:
        super().__init__(notes, every_s=every_s)
        self._url = url
        self._judge = judge

    def step(self) -> None:
        """One look at the versions."""
        with httpx.Client(base_url=self._url, timeout=_TIMEOUT_S) as http, ErrataClient(self._url) as client:
            for number in sorted(set(served(http)) - set(self._judge.truth.known())):
                for wrong in self._judge.truth.record(number, client, http):
                    self.notes.wrong(wrong)
                self._judge.work_off()
        self._judge.work_off()
