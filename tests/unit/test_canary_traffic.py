"""Who gets the canary, what is counted of it, and what the counts say."""

import asyncio
import random
import threading
from collections.abc import Mapping
from typing import cast

import pytest
from redis.exceptions import ConnectionError as RedisAwayError

from service.canary import Canaries, judge
from service.errors import VersionNotReachedError
from service.gateway.canary import CanaryTraffic
from service.gateway.models import Admission, CanaryAssignment, resolve
from service.metrics.process import Passage, ServiceMetrics
from service.registry import VersionReader
from service.schemas import Activation, Canary, Outcomes
from service.settings import Settings

ALWAYS = Settings(canary_share=1, canary_requests=100, canary_s=60, canary_max_excess=0.05)
SINCE = 1000


class Versions:
    """Version 3 is active; everything up to 9 is verified."""

    def __init__(self, canary: int | None) -> None:
        self._canary = canary

    async def active(self) -> Activation:
        return Activation(active=3, previous=2, epoch=4, canary=self._canary)

    async def is_verified(self, number: int) -> bool:
        return number < 10


class Told:
    """What Redis is told; away while it must not answer."""

    def __init__(self) -> None:
        self.counts: list[tuple[int, dict[str, int]]] = []
        self.away = False
        self.heard = threading.Event()

    def count(self, version: int, counts: Mapping[str, int]) -> None:
        if self.away:
            raise RedisAwayError
        self.counts.append((version, dict(counts)))
        self.heard.set()


def resolved(
    assignment: CanaryAssignment, *, canary: int | None = 4, model: str = "errata", least: str | None = None
) -> tuple[int, int | None]:
    admission = asyncio.run(resolve(cast(VersionReader, Versions(canary)), model, least, assignment))
    return admission.version, admission.canary


def traffic(told: Told | None = None, *, share: float = 0.0, keys: tuple[str, ...] = ()) -> CanaryTraffic:
    draws = random.Random(22)
    return CanaryTraffic(cast(Canaries, told or Told()), share=share, keys=keys, draw=draws.random)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_so_many_of_the_draws_are_the_canarys(share: float) -> None:
    made = traffic(share=share)
    drawn = [made.assign(None) for _ in range(10_000)].count(CanaryAssignment.SAMPLED)
    assert drawn / 10_000 == pytest.approx(share, abs=0.01 if 0 < share < 1 else 0)


def test_a_named_key_needs_no_luck() -> None:
    made = traffic(keys=("tester",))
    assert [made.assign(name) for name in ("tester", "other", None)] == [
        CanaryAssignment.BY_KEY,
        CanaryAssignment.NONE,
        CanaryAssignment.NONE,
    ]


@pytest.mark.parametrize(
    ("assignment", "least", "expected"),
    [
        (CanaryAssignment.NONE, None, 3),
        (CanaryAssignment.SAMPLED, None, 4),
        (CanaryAssignment.BY_KEY, None, 4),
        (CanaryAssignment.SAMPLED, "3", 4),
        (CanaryAssignment.NONE, "3", 3),
        (CanaryAssignment.BY_KEY, "4", 4),
    ],
)
def test_the_alias_means_the_canary_for_its_part_of_the_traffic(
    assignment: CanaryAssignment, least: str | None, expected: int
) -> None:
    assert resolved(assignment, least=least) == (expected, 4)


@pytest.mark.parametrize(("assignment", "answers"), [(CanaryAssignment.NONE, 3), (CanaryAssignment.SAMPLED, 3)])
def test_a_version_is_not_reached_by_luck(assignment: CanaryAssignment, answers: int) -> None:
    with pytest.raises(VersionNotReachedError) as error:
        resolved(assignment, least="4")
    assert error.value.headers == {"X-Errata-Version": str(answers)}


def test_who_demands_more_than_the_canary_is_refused() -> None:
    with pytest.raises(VersionNotReachedError):
        resolved(CanaryAssignment.BY_KEY, least="5")


@pytest.mark.parametrize("assignment", list(CanaryAssignment))
def test_a_named_version_and_times_without_a_canary_are_as_ever(assignment: CanaryAssignment) -> None:
    assert resolved(assignment, canary=None) == (3, None)
    for version in (0, 3, 4):
        assert resolved(assignment, model=f"errata@{version}") == (version, None)


async def test_what_the_node_had_its_part_in_is_told_and_nothing_else() -> None:
    told = Told()
    made = traffic(told, share=1)
    for outcome in ("ok", "ok", "unavailable", "broken", "client_error", "aborted"):
        made.ended(Admission(4, 4), outcome)
        made.ended(Admission(3, 4), outcome)
        made.ended(Admission(4), outcome)
    await made.stop()
    assert told.counts == [(4, {"canary_ok": 2, "canary_errors": 2, "active_ok": 2, "active_errors": 2})]


async def test_counts_are_told_while_the_gateway_runs_and_a_redis_that_is_away_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.gateway.canary._SEND_EVERY_S", 0.01)
    told = Told()
    told.away = True
    made = traffic(told)
    await made.start()
    made.ended(Admission(4, 4), "ok")
    await asyncio.sleep(0.2)
    told.away = False
    made.ended(Admission(4, 4), "broken")
    assert await asyncio.to_thread(told.heard.wait, 10)
    assert told.counts == [(4, {"canary_errors": 1})]
    await made.stop()


def test_a_request_that_the_gateway_itself_refused_says_nothing_of_the_version() -> None:
    told: list[str] = []
    for of_node in (False, True):
        Passage(ServiceMetrics(), 4, began=0, told=told.append).end("unavailable", of_node=of_node)
    assert told == ["unavailable"]


def judged(canary: tuple[int, int], active: tuple[int, int], *, after_s: float = 1) -> tuple[bool, bool]:
    """Whether it must be withdrawn, and whether its time is over, by (ok, errors) of both."""
    sides = [Outcomes(ok=ok, errors=errors) for ok, errors in (canary, active)]
    found = judge(Canary(version=4, since=SINCE, of_canary=sides[0], of_active=sides[1]), ALWAYS, now=SINCE + after_s)
    return found.reason is not None, found.over


@pytest.mark.parametrize(
    ("canary", "active", "after_s", "withdrawn", "over"),
    [
        ((0, 0), (0, 0), 1, False, False),
        ((0, 0), (1000, 0), 60, False, True),  # nobody asked it
        ((99, 0), (0, 0), 59, False, False),
        ((100, 0), (0, 0), 1, False, True),
        ((95, 5), (1000, 0), 1, False, True),
        ((94, 6), (1000, 0), 1, True, True),
        ((0, 5), (1000, 0), 1, False, False),  # the next 95 may all be right
        ((0, 6), (1000, 0), 1, True, False),  # and now that would not help
        ((19, 1), (0, 0), 60, False, True),
        ((18, 1), (0, 0), 60, True, True),  # judged by those that came
        ((80, 20), (80, 20), 1, False, True),  # the nodes have their troubles with both
        ((74, 26), (80, 20), 1, True, True),
        ((0, 26), (80, 20), 1, True, False),
    ],
)
def test_the_counts_decide_whether_a_canary_is_withdrawn_or_over(
    canary: tuple[int, int], active: tuple[int, int], after_s: float, withdrawn: bool, over: bool
) -> None:
    assert judged(canary, active, after_s=after_s) == (withdrawn, over)


def test_the_reason_has_the_numbers() -> None:
    outcomes = Canary(version=4, since=SINCE, of_canary=Outcomes(errors=6), of_active=Outcomes(ok=8, errors=2))
    reason = judge(outcomes, ALWAYS.model_copy(update={"canary_requests": 10}), now=SINCE).reason
    assert reason == (
        "6 of 6 requests failed as a canary, 2 of 10 of the active version; the most that is allowed above it is 0.05"
    )


def test_where_no_canary_is_asked_for_any_more_its_time_is_over() -> None:
    assert judge(Canary(version=4, since=SINCE, of_canary=Outcomes(), of_active=Outcomes()), Settings(), now=SINCE).over


def test_keys_or_a_share_ask_for_canaries() -> None:
    assert not Settings().canary
    assert Settings(canary_share=0.1).canary
    asked = Settings.from_env({"ERRATA_CANARY_KEYS": "one, the other"})
    assert (asked.canary, asked.canary_keys) == (True, ("one", "the other"))
    assert asked.environment() == {"ERRATA_CANARY_KEYS": "one,the other"}
