"""Finds the suspects that make a trial fail, in few trials."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def culprits(suspects: Sequence[T], fails: Callable[[Sequence[T]], bool], *, most: int) -> tuple[list[T], bool]:
    """Return suspects without which the trial passes, in order, and whether it does; at most `most` of them.

    It looks for the shortest beginning of the suspects with which the trial fails; its last one is a culprit. A culprit
    costs a trial for each halving of the suspects, and one more for the rest. If suspects are harmless unless they come
    together, the last of them is the culprit.

    Args:
        suspects: all of them together fail, and none of them alone does not; neither is tried again.
        fails: whether a trial of some of them, in their order, fails.
        most: when so many are found and the rest still fails, the search ends.
    """
    good: list[T] = []
    bad: list[T] = []
    pending = list(suspects)
    while len(bad) < most:
        passing, failing = 0, len(pending)
        while failing - passing > 1:
            middle = (passing + failing) // 2
            if fails([*good, *pending[:middle]]):
                failing = middle
            else:
                passing = middle
        good += pending[:passing]
        bad.append(pending[passing])
        pending = pending[failing:]
        if not pending or not fails([*good, *pending]):
            return bad, True
    return bad, False
