import pytest
from scripted_clock import Clock

from service.api.rates import Rates
from service.api_keys import ApiKey


def key(rate: int | None, name: str = "a") -> ApiKey:
    return ApiKey(id=name, name=name, scopes=(), created_at=0, rate=rate)


@pytest.fixture
def rates(clock: Clock) -> Rates:
    return Rates(monotonic=clock)


@pytest.mark.parametrize("rate", [1, 7, 60, 1_000])
def test_a_minutes_worth_at_once_then_evenly(rates: Rates, clock: Clock, rate: int) -> None:
    assert [rates.wait_s(key(rate)) for _ in range(rate)] == [0] * rate
    wait_s = rates.wait_s(key(rate))
    assert wait_s == pytest.approx(60 / rate)
    clock.now += wait_s / 2
    assert rates.wait_s(key(rate)) == pytest.approx(wait_s / 2), "a refused request costs nothing"
    clock.now += wait_s / 2
    assert rates.wait_s(key(rate)) == 0
    assert rates.wait_s(key(rate)) > 0


def test_over_an_hour_no_more_than_its_rate_and_one_burst(rates: Rates, clock: Clock) -> None:
    admitted = 0
    for _ in range(3600 * 4):
        admitted += rates.wait_s(key(60)) == 0
        clock.now += 0.25
    assert 3600 <= admitted <= 3600 + 60


def test_who_was_idle_has_a_minutes_worth_and_no_more(rates: Rates, clock: Clock) -> None:
    for _ in range(2):
        assert [rates.wait_s(key(5)) == 0 for _ in range(6)] == [True] * 5 + [False]
        clock.now += 3600


def test_keys_are_counted_apart_and_some_not_at_all(rates: Rates) -> None:
    assert rates.wait_s(key(1, "a")) == 0
    assert rates.wait_s(key(1, "a")) > 0
    assert rates.wait_s(key(1, "b")) == 0
    assert [rates.wait_s(key(None, "c")) for _ in range(100)] == [0] * 100
