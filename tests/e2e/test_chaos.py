"""The chaos test in its short form: faults that a node survives, one of each kind; `make chaos` has them all."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.chaos.campaign import carry_out
from tests.chaos.world import World, world_of_its_own

pytestmark = pytest.mark.timeout(900)

SEED = 4
KINDS = (
    "API killed",
    "control worker killed",
    "train worker killed while it trains",
    "Redis killed",
    "disk full under Redis",
    "committed delta with a flipped bit",
    "half-written version folders",
    "claim left behind",
    "tasks delivered again",
    "burst beyond the gateway's bound",
)


@pytest.fixture
def world(default_model: Path, tmp_path: Path) -> Iterator[World]:
    with world_of_its_own(tmp_path, Random(SEED)) as running:
        yield running


def test_nothing_is_lost_and_nothing_wrong_is_served_under_faults(world: World) -> None:
    outcome = carry_out(world, seed=SEED, kinds=KINDS, count=len(KINDS), longest_s=300, rest_within_s=240, pause_s=1)
    assert outcome.wrong == []
    assert {fault.kind for fault in outcome.injected} == set(KINDS)
    assert outcome.counts["answers judged"] >= 50
    assert len(world.judge.judged) >= 3
    assert world.judge.telling >= 20, "versions were told apart by their answers"
