from collections.abc import Sequence

import pytest
import torch
from tiny_models import tiny_base
from torch import Tensor

from worker.training.breadth_first import TrainingConfig, train
from worker.training.device_states import DeviceStates, room_bytes
from worker.training.encode import TrainingEdit
from worker.training.prefix import PrefixCache

CPU = torch.device("cpu")
STATES = {bytes([key]): torch.full((2 + key, 4), float(key)) for key in range(6)}
BYTES = {key: state.nbytes for key, state in STATES.items()}


class Host:
    """Says of what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def ask(self, states: DeviceStates, keys: Sequence[int]) -> list[Tensor]:
        def read(places: Sequence[int]) -> list[Tensor]:
            self.asked.append([keys[place] for place in places])
            return [STATES[bytes([keys[place]])] for place in places]

        found = states.get([bytes([key]) for key in keys], read)
        assert all(torch.equal(state, STATES[bytes([key])]) for key, state in zip(keys, found, strict=True))
        return found


def test_what_is_on_the_device_is_not_read_again() -> None:
    states, host = DeviceStates(CPU, sum(BYTES.values())), Host()
    for keys in ([0, 1, 2], [2, 0], [3, 1, 3, 4], [4, 3, 2, 1, 0]):
        host.ask(states, keys)
    assert host.asked == [[0, 1, 2], [3, 4]]


def test_without_room_for_more_all_are_let_go() -> None:
    states, host = DeviceStates(CPU, BYTES[b"\3"] + BYTES[b"\4"] + BYTES[b"\5"]), Host()
    host.ask(states, [3, 4])
    host.ask(states, [4, 5])
    host.ask(states, [2, 4])
    assert sorted(map(tuple, host.asked)) == sorted([(3, 4), (5,), (2,), (2, 4)])
    assert states._bytes == sum(state.nbytes for state in states._states.values()) <= states._room_bytes


def test_what_does_not_fit_together_stays_where_it_is() -> None:
    states, host = DeviceStates(CPU, BYTES[b"\5"]), Host()
    assert all(state is STATES[bytes([key])] for key, state in zip([4, 5], host.ask(states, [4, 5]), strict=True))
    assert not states._states


def test_a_cpu_keeps_no_states() -> None:
    assert room_bytes(CPU) == 0


def test_a_run_reads_every_sequence_once_and_is_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    edits = [TrainingEdit(name, name, name.upper()) for name in ("one", "two", "three")]
    config = TrainingConfig(max_epochs=5, min_steps=0, loss_threshold=0, preserve=0)
    expected = train(base, edits, config, prefix=PrefixCache()).tensors
    reads: list[int] = []
    hidden = PrefixCache.hidden

    def counted(self: PrefixCache, base: object, sequences: Sequence[object]) -> list[Tensor]:
        reads.append(len(sequences))
        return hidden(self, base, sequences)

    monkeypatch.setattr(PrefixCache, "hidden", counted)
    monkeypatch.setattr("worker.training.prefix.room_bytes", lambda _: 1 << 20)
    found = train(base, edits, config, prefix=PrefixCache()).tensors
    # To move the six, and the template that the three of chat share.
    assert sum(reads) == 7
    assert all(torch.equal(found[name], expected[name]) for name in expected)
