import json
from collections.abc import Sequence

import pytest
import torch

from worker.training.config import Pipeline, TrainingConfig
from worker.training.schedule import Schedule, schedule


def make(sequences: int = 0, *, seed: int = 0, **settings: object) -> Schedule:
    config = TrainingConfig(**{"batch_size": 4, **settings})
    made = schedule(config, torch.Generator().manual_seed(seed))
    if sequences:
        made.join([False] * sequences)
    return made


def mark(made: Schedule, numbers: Sequence[int], *, learned: bool = True) -> None:
    for number in numbers:
        made.mark(number, learned=learned)


def visited(made: Schedule) -> list[int]:
    return [number for batch in made.epoch() for number in batch]


def test_plain_visits_everything_each_epoch_in_another_order() -> None:
    plain = make(10, skip_learned=False)
    mark(plain, range(10))
    epochs = [visited(plain) for _ in range(5)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert [len(batch) for batch in plain.epoch()] == [4, 4, 2]


def test_another_seed_is_another_order() -> None:
    assert visited(make(20)) == visited(make(20))
    assert visited(make(20)) != visited(make(20, seed=1))


def test_learned_sequences_are_rehearsed_as_many_as_there_are_unlearned() -> None:
    made = make(40)
    mark(made, range(30))
    epochs = [visited(made) for _ in range(8)]
    for epoch in epochs:
        assert set(epoch) >= set(range(30, 40))
        assert len(epoch) == len(set(epoch)) == 20
    rehearsed = [frozenset(epoch) - set(range(30, 40)) for epoch in epochs]
    assert len(set(rehearsed)) > 1
    assert len(frozenset.union(*rehearsed)) > 10


@pytest.mark.parametrize(("unlearned", "expected"), [(1, 1 + 4), (3, 3 + 4), (6, 6 + 6), (18, 20)])
def test_rehearsal_is_a_batch_at_least_and_everything_at_most(unlearned: int, expected: int) -> None:
    made = make(20)
    mark(made, range(20 - unlearned))
    assert len(visited(made)) == expected


@pytest.mark.parametrize(("unlearned", "expected"), [(20, 1), (12, 1), (6, 6 / 14), (1, 4 / 19), (0, 4 / 20)])
def test_the_share_that_is_replayed_is_of_what_is_learned_now(unlearned: int, expected: float) -> None:
    made = make(20)
    mark(made, range(20 - unlearned))
    assert made.replayed == expected
    mark(made, range(20), learned=False)
    assert made.replayed == 1


@pytest.mark.parametrize("settings", [{"skip_learned": False}, {"pipeline": Pipeline.DEPTH_FIRST}])
def test_without_rehearsal_nothing_is_left_out(settings: dict[str, object]) -> None:
    made = make(20, **settings)
    mark(made, range(19))
    assert made.replayed == 1


def test_what_joins_is_visited_and_what_joins_learned_is_rehearsed_only() -> None:
    made = make()
    made.join([True] * 50)
    made.join([False, False, True])
    epoch = visited(made)
    assert {50, 51} <= set(epoch)
    assert len(epoch) == 2 + 4
    assert not made.finished


def test_what_is_found_forgotten_is_visited_again() -> None:
    made = make(20)
    mark(made, range(20))
    assert made.finished
    made.mark(7, learned=False)
    assert not made.finished
    assert all(7 in visited(made) for _ in range(5))


def test_depth_first_takes_one_batch_until_it_is_learned_and_never_returns() -> None:
    made = make(10, pipeline=Pipeline.DEPTH_FIRST, max_epochs=100)
    seen: list[list[int]] = []
    while not made.finished:
        (batch,) = made.epoch()
        assert made.epoch() == [batch]
        mark(made, batch[:-1])
        assert made.epoch() == [batch]
        mark(made, batch[-1:])
        seen.append(batch)
    assert [len(batch) for batch in seen] == [4, 4, 2]
    assert sorted(number for batch in seen for number in batch) == list(range(10))
    assert sorted(seen[0]) != [0, 1, 2, 3]


def test_depth_first_stays_with_a_batch_of_which_something_was_unlearned_again() -> None:
    made = make(8, pipeline=Pipeline.DEPTH_FIRST, max_epochs=100)
    (batch,) = made.epoch()
    mark(made, batch[:1])
    assert made.epoch() == [batch]
    mark(made, batch[1:])
    mark(made, batch[:1], learned=False)
    assert made.epoch() == [batch]
    mark(made, batch)
    assert made.epoch() != [batch]


def test_depth_first_gives_a_batch_up_when_its_epochs_are_spent() -> None:
    made = make(8, pipeline=Pipeline.DEPTH_FIRST, max_epochs=3)
    batches = []
    while not made.finished:
        batches += made.epoch()
    first, second = batches[0], batches[3]
    assert batches == [first] * 3 + [second] * 3
    assert not set(first) & set(second)


def test_depth_first_does_not_visit_what_is_learned_already() -> None:
    made = make(pipeline=Pipeline.DEPTH_FIRST)
    made.join([True, False, True, False])
    assert sorted(visited(made)) == [1, 3]


@pytest.mark.parametrize("pipeline", Pipeline)
def test_a_restored_schedule_goes_on_as_the_first_one_did(pipeline: Pipeline) -> None:
    generator = torch.Generator().manual_seed(3)
    made = schedule(TrainingConfig(batch_size=4, pipeline=pipeline), generator)
    made.join([False] * 18)
    mark(made, visited(made)[:3])
    state, shuffle = made.state(), generator.get_state()
    expected = []
    for _ in range(4):
        expected.append(visited(made))
        mark(made, expected[-1])

    other = torch.Generator().manual_seed(99)
    again = schedule(TrainingConfig(batch_size=4, pipeline=pipeline), other)
    again.join([False] * 18)
    other.set_state(shuffle)
    again.restore(json.loads(json.dumps(state)))
    found = []
    for _ in range(4):
        found.append(visited(again))
        mark(again, found[-1])
    assert found == expected


@pytest.mark.parametrize("pipeline", Pipeline)
def test_what_joined_since_the_state_was_taken_stays(pipeline: Pipeline) -> None:
    made = make(6, pipeline=pipeline)
    mark(made, range(6))
    again = make(pipeline=pipeline, batch_size=2)
    again.join([False] * 6 + [True, False, False])
    again.restore(made.state())
    met: set[int] = set()
    assert not again.finished
    while not again.finished:
        epoch = visited(again)
        met.update(epoch)
        mark(again, [number for number in epoch if number > 6])  # the seventh joined learned and needs no mark
    assert {7, 8} <= met
