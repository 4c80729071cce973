from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.bisection import culprits


class Trials:
    """Counts the trials, and refuses those that nobody needs."""

    def __init__(self, fails: Callable[[Sequence[int]], bool]) -> None:
        self._fails = fails
        self.tried: list[tuple[int, ...]] = []

    def __call__(self, some: Sequence[int]) -> bool:
        assert tuple(some) not in self.tried, "nothing is tried twice"
        assert list(some) == sorted(some), "suspects keep their order"
        self.tried.append(tuple(some))
        return self._fails(some)


@pytest.mark.parametrize(("count", "trials"), [(2, 2), (3, 3), (8, 4), (1000, 11)])
def test_one_culprit_costs_a_trial_for_each_halving(count: int, trials: int) -> None:
    for culprit in {0, count // 2, count - 1}:
        fails = Trials(lambda some, culprit=culprit: culprit in some)
        assert culprits(range(count), fails, most=3) == ([culprit], True)
        assert len(fails.tried) <= trials


def test_one_suspect_needs_no_trial() -> None:
    fails = Trials(lambda _: True)
    assert culprits([7], fails, most=3) == ([7], True)
    assert fails.tried == []


def test_the_search_ends_at_the_most() -> None:
    fails = Trials(bool)
    assert culprits(range(10), fails, most=3) == ([0, 1, 2], False)


def test_all_may_be_culprits() -> None:
    assert culprits(range(3), Trials(bool), most=3) == ([0, 1, 2], True)


@given(st.integers(1, 60).flatmap(lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count - 1)))))
def test_every_culprit_is_found_and_no_other(case: tuple[int, set[int]]) -> None:
    count, bad = case
    if not bad:
        return
    fails = Trials(lambda some: bool(bad & set(some)))
    assert culprits(range(count), fails, most=len(bad)) == (sorted(bad), True)
    assert len(fails.tried) <= len(bad) * ((count - 1).bit_length() + 1)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(0, 30), st.integers(1, 5))
def test_the_rest_passes_whatever_makes_it_fail(weights: list[int], limit: int, most: int) -> None:
    def too_heavy(some: Sequence[int]) -> bool:
        return sum(weights[one] for one in some) > limit

    everything = range(len(weights))
    if not too_heavy(everything):
        return
    trials = Trials(too_heavy)
    found, passes = culprits(everything, trials, most=most)
    rest = [one for one in everything if one not in found]
    assert too_heavy(rest) is not passes
    assert len(found) <= most
    assert passes or len(found) == most
    assert len(trials.tried) <= most * ((len(weights) - 1).bit_length() + 1)
    passed = [tried for tried in trials.tried if not too_heavy(tried)]
    if passes and rest:
        assert tuple(rest) == passed[-1], "the last trial that passed is that of the rest"
