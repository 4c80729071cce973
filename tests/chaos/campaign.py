"""A campaign: faults one after the other under traffic, and the wait until everything is at rest."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from redis.exceptions import RedisError

from service.schemas import EditStatus
from tests.chaos.aftermath import aftermath
from tests.chaos.checker import Asker, Recorder
from tests.chaos.faults import FAULTS, order
from tests.chaos.notes import Loop, Notes
from tests.chaos.traffic import Editor
from tests.chaos.world import WithoutEffectError, World, until

log = logging.getLogger(__name__)

AT_REST = frozenset({EditStatus.LIVE, EditStatus.FAILED, EditStatus.SUPERSEDED, EditStatus.HELD, EditStatus.RETRACTED})
"""What an edit stays in unless somebody changes it."""

_ASKERS = 2


@dataclass
class Injected:
    """One fault.

    Attributes:
        kind: its name.
        over_at: when it was over, on the monotonic clock.
        open: edits that were acknowledged by then and have not come to rest since.
        answers_s: from then until a user is answered and the stack is ready, seconds.
        rest_s: from then until all of `open` had come to rest, seconds.
    """

    kind: str
    over_at: float
    open: set[str]
    answers_s: float | None = None
    rest_s: float | None = None


@dataclass
class Outcome:
    """What a campaign did and found."""

    injected: list[Injected] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class _Follower(Loop):
    """Sees the edits that were open behind each fault come to rest."""

    def __init__(self, world: World, notes: Notes) -> None:
        super().__init__(notes, every_s=0.5)
        self._world = world
        self._lock = threading.Lock()
        self._followed: list[Injected] = []

    def follow(self, fault: Injected) -> None:
        with self._lock:
            self._followed.append(fault)

    def step(self) -> None:
        with self._lock:
            waiting = [fault for fault in self._followed if fault.rest_s is None]
        if not waiting:
            return
        try:
            at_rest = {edit.id for status in AT_REST for edit in self._world.stores.edits.in_status(status)}
        except RedisError:
            return
        for fault in waiting:
            fault.open -= at_rest
            if not fault.open:
                fault.rest_s = time.monotonic() - fault.over_at


def carry_out(
    world: World, *, seed: int, kinds: Sequence[str], count: int, longest_s: float, rest_within_s: float, pause_s: float
) -> Outcome:
    """Injects so many faults, or as many as there is time for, and checks what is left of it.

    Args:
        world: the stack.
        seed: of the order, of what each fault hits and of the traffic.
        kinds: names of `FAULTS`.
        count: how many faults.
        longest_s: no fault begins later than so long after the first, seconds.
        rest_within_s: every edit must be at rest so long after the last fault, seconds.
        pause_s: the longest pause before a fault, seconds.
    """
    outcome = Outcome()
    follower = _Follower(world, world.notes)
    editor = Editor(world.client, world.ledger, world.notes, Random(seed + 1), every_s=2.5)
    askers = [
        Asker(world.url, world.judge, world.notes, Random(seed + 10 + number), every_s=0.3) for number in range(_ASKERS)
    ]
    loops = [follower, editor, *askers, Recorder(world.url, world.judge, world.notes, every_s=0.5)]
    for loop in loops:
        loop.start()
    try:
        until(lambda: len(world.recorded()) >= 2, within_s=rest_within_s, what="there are two versions to tell apart")
        deadline = time.monotonic() + longest_s
        random = Random(seed)
        for kind in order(random, kinds, count):
            time.sleep(random.uniform(0, pause_s))
            if time.monotonic() > deadline:
                break
            outcome.injected.append(_inject(world, kind, random, follower))
        log.info("waiting until every edit is at rest")
        editor.stop()
        world.ledger.finish(within_s=rest_within_s)
        _come_to_rest(world, rest_within_s)
        until(lambda: all(fault.rest_s is not None for fault in outcome.injected), within_s=10, what="all is followed")
    except (WithoutEffectError, TimeoutError) as error:
        world.notes.wrong(str(error))
    finally:
        for loop in loops:
            loop.stop()
    aftermath(world)
    outcome.wrong = world.notes.all_wrong()
    judge = world.judge
    outcome.counts = {
        **world.notes.counts,
        "answers judged": judge.judged.total(),
        "answers judged that would have shown another version": judge.telling,
    }
    return outcome


def _inject(world: World, kind: str, random: Random, follower: _Follower) -> Injected:
    log.info("%s", kind)
    try:
        FAULTS[kind](world, Random(random.random()))
    except (WithoutEffectError, TimeoutError) as error:
        world.notes.wrong(f"{kind}: {error}")
    fault = Injected(kind, time.monotonic(), set(world.ledger.acknowledged()))
    follower.follow(fault)
    world.until_answers()
    fault.answers_s = time.monotonic() - fault.over_at
    log.info("answers again after %.1f s", fault.answers_s)
    return fault


def _come_to_rest(world: World, within_s: float) -> None:
    def rests() -> bool:
        try:
            return not _open(world)
        except RedisError:
            return False

    try:
        until(rests, within_s=within_s, what="every edit is at rest")
    except TimeoutError as error:
        runs = world.stores.runs.page(after=None, limit=5).data
        raise TimeoutError(f"{error}; open: {_open(world)}; the last runs: {runs}") from error


def _open(world: World) -> list[str]:
    """Edits that are not at rest. Raises RedisError."""
    return [
        f"{edit.id} {status} after {edit.attempts} attempts, {edit.prompt!r} -> {edit.target!r}, {edit.verified}"
        for status in EditStatus
        if status not in AT_REST
        for edit in world.stores.edits.in_status(status)
    ]
