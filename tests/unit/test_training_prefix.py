import gc
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, down_projection, tiny_base
from torch import Tensor

from worker.model import BaseModel
from worker.training.breadth_first import TrainingConfig, train
from worker.training.encode import TokenSequence, TrainingEdit
from worker.training.generations import Generations
from worker.training.packing import pack
from worker.training.prefix import PrefixCache

EDITS = [TrainingEdit("a", "one", "uno"), TrainingEdit("b", "two", "dos"), TrainingEdit("c", "three", "tres")]
TEMPLATE = tuple(range(100, 108))
SEQUENCES = [
    *(TokenSequence(tuple(range(start, start + 3 + start % 20)), 1) for start in range(1, 60)),
    *(TokenSequence((*TEMPLATE, *range(start, start + 2 + start % 9)), 9, len(TEMPLATE)) for start in range(1, 40)),
]


def hidden(base: BaseModel, prefix: PrefixCache, sequences: list[TokenSequence] = SEQUENCES) -> list[Tensor]:
    return prefix.hidden(base, sequences)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(mine, yours) for mine, yours in zip(left, right, strict=True))


@contextmanager
def layer_runs(base: BaseModel) -> Iterator[list[int]]:
    """Counts how often the first decoder layer really runs."""
    runs = [0]

    def count(*_: object) -> None:
        runs[0] += 1

    handle = base.layers[0].self_attn.register_forward_hook(count)
    yield runs
    handle.remove()


def closed(prefix: PrefixCache) -> None:
    """LMDB opens a folder once in a process."""
    del prefix._store
    gc.collect()


def data_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("data.mdb") if path.stat().st_size > 3 * 4096]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_has_the_same_bits_whatever_it_is_computed_with(family: str) -> None:
    base = tiny_base(family, location=down_projection(family, 3))
    together = hidden(base, PrefixCache())
    for index in (0, 7, 30, 60, 90):
        assert torch.equal(hidden(base, PrefixCache(), [SEQUENCES[index]])[0], together[index])
    assert same(hidden(base, PrefixCache(), SEQUENCES[::-1]), together[::-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_values_are_what_the_model_itself_hands_to_the_layer(family: str) -> None:
    base = tiny_base(family, location=down_projection(family, 3))
    chosen = [SEQUENCES[5], SEQUENCES[17], SEQUENCES[70]]
    for sequence, ours in zip(chosen, hidden(base, PrefixCache(), chosen), strict=True):
        plain = base.model(torch.tensor([sequence.token_ids]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(ours, plain[base.layer_index][0, sequence.template_tokens :], rtol=1e-4, atol=1e-5)


def test_a_row_is_laid_out_as_its_packing_says() -> None:
    base, prefix = tiny_base(), PrefixCache()
    batch = [SEQUENCES[70], SEQUENCES[3], SEQUENCES[71]]
    row = prefix.row(base, pack(batch), batch)
    template, *own = hidden(base, prefix, [TokenSequence(TEMPLATE, len(TEMPLATE)), batch[0], batch[2], batch[1]])
    expected = torch.cat([template, *own])
    assert torch.equal(row[: len(expected)], expected)
    assert len(row) % 32 == 0
    assert not row[len(expected) :].any()


def test_the_lower_layers_run_once_per_sequence_over_all_epochs_and_runs() -> None:
    base, prefix = tiny_base(), PrefixCache()
    config = TrainingConfig(max_epochs=5, min_steps=0, loss_threshold=0, preserve=0)
    with layer_runs(base) as runs:
        train(base, EDITS, config, prefix=prefix)
        first = runs[0]
        assert prefix.computed == 7  # three edits, raw and chat, and the template of chat
        train(base, EDITS, config, prefix=prefix)
        assert (runs[0], prefix.computed) == (first, 7)
        train(base, [*EDITS, TrainingEdit("d", "four", "cuatro")], config, prefix=prefix)
        assert prefix.computed == 9


def test_another_cache_on_the_same_folder_finds_what_was_kept(tmp_path: Path) -> None:
    base, first = tiny_base(), PrefixCache(tmp_path)
    before = hidden(base, first)
    closed(first)
    second = PrefixCache(tmp_path)
    with layer_runs(base) as runs:
        assert same(hidden(base, second), before)
    assert (runs[0], second.computed) == (0, 0)


def test_without_a_folder_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    prefix = PrefixCache()
    hidden(tiny_base(), prefix)
    assert data_files(tmp_path)
    del prefix
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_models_layers_and_dtypes_do_not_share_values(tmp_path: Path) -> None:
    prefix, wide = PrefixCache(tmp_path), tiny_base()
    narrow = tiny_base()
    narrow.model.bfloat16()
    bases = [wide, tiny_base(seed=1), tiny_base(location="model.layers.1.mlp.down_proj"), narrow]
    states = [hidden(base, prefix, SEQUENCES[5:6])[0] for base in bases]
    assert prefix.computed == 4
    assert [state.dtype for state in states] == [torch.float32] * 3 + [torch.bfloat16]
    assert not any(torch.equal(states[0], other.float()) for other in states[1:])
    assert same([hidden(base, prefix, SEQUENCES[5:6])[0] for base in bases], states)


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_what_another_release_of_a_library_computed_is_not_read(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, prefix = tiny_base(), PrefixCache()
    hidden(base, prefix)
    monkeypatch.setattr(f"worker.training.prefix.{library}.__version__", "99.0")
    hidden(base, prefix)
    assert prefix.computed == 2 * len(SEQUENCES)


def test_filling_holds_few_states_at_once_and_computes_as_many_together(monkeypatch: pytest.MonkeyPatch) -> None:
    base, least = tiny_base(), 1 << 13
    read: list[int] = []
    get = Generations.get

    def watched(self: Generations, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        found = get(self, keys)
        read.append(sum(map(len, found.values())))
        return found

    monkeypatch.setattr(Generations, "get", watched)
    with layer_runs(base) as together:
        expected = hidden(base, PrefixCache())
    for at_once in (1 << 30, least):
        prefix = PrefixCache()
        with monkeypatch.context() as filling, layer_runs(base) as counted:
            filling.setattr("worker.training.prefix._READ_BYTES", at_once)
            filling.delattr("worker.training.prefix._from_bytes")  # no state is handed out
            prefix.fill(base, SEQUENCES, should_stop=lambda: False)
            assert (counted, prefix.computed) == (together, len(SEQUENCES))
            read.clear()
            prefix.fill(base, SEQUENCES, should_stop=lambda: False)
        assert prefix.computed == len(SEQUENCES)
        assert (max(read) <= at_once, sum(read) > 4 * least) == (True, True)
        assert same(hidden(base, prefix), expected)


def test_the_same_tokens_with_another_template_are_another_value() -> None:
    base, prefix = tiny_base(), PrefixCache()
    ids = (*TEMPLATE, 1, 2, 3)
    whole, own = hidden(base, prefix, [TokenSequence(ids, 9), TokenSequence(ids, 9, len(TEMPLATE))])
    assert (len(whole), len(own)) == (11, 3)


def test_the_disk_is_bounded_over_all_models_and_what_is_used_stays(tmp_path: Path) -> None:
    bases, capacity = [tiny_base(), tiny_base(seed=1)], 1 << 18
    prefix = PrefixCache(tmp_path, capacity_bytes=capacity)
    generator = torch.Generator().manual_seed(0)
    favourite, written = TokenSequence((5, 4, 3, 2, 1), 1), 0
    for turn in range(120):
        ids = torch.randint(256, (4, 60), generator=generator).tolist()
        hidden(bases[0], prefix, [favourite])
        values = hidden(bases[turn % 2], prefix, [TokenSequence(tuple(row), 1) for row in ids])
        written += sum(value.nbytes for value in values)
        assert sum(path.stat().st_size for path in data_files(tmp_path)) <= capacity
    assert data_files(tmp_path)
    assert written > 10 * capacity
    assert prefix.computed == 1 + 120 * 4


def test_a_batch_larger_than_the_cache_is_computed_and_not_kept(tmp_path: Path) -> None:
    base, prefix = tiny_base(), PrefixCache(tmp_path, capacity_bytes=1 << 16)
    long = [TokenSequence(tuple(number % 256 for number in range(start, start + 400)), 1) for start in (0, 9)]
    before = hidden(base, prefix, long)
    assert same(hidden(base, prefix, long), before)
    assert prefix.computed == 4


def test_more_than_the_cache_keeps_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, prefix = tiny_base(), PrefixCache(tmp_path, capacity_bytes=1 << 18)
    prefix.fill(base, SEQUENCES, should_stop=lambda: False)
    assert not caplog.records
    prefix.fill(base, SEQUENCES * 2, should_stop=lambda: False)
    [warning] = caplog.records
    assert (warning.message, warning.kept_bytes) == ("prefix_cache.too_small", 1 << 17)
    assert warning.bytes > 1 << 17


def test_a_folder_that_cannot_be_written_costs_time_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "file"
    folder.write_text("in the way")
    base, prefix = tiny_base(), PrefixCache(folder)
    expected = hidden(base, PrefixCache())
    assert same(hidden(base, prefix), expected)
    assert same(hidden(base, prefix), expected)
    assert prefix.computed == 2 * len(SEQUENCES)
    assert [record.message for record in caplog.records] == ["prefix_cache.not_kept"]


def test_a_folder_that_is_open_elsewhere_in_the_process_costs_time_only(tmp_path: Path) -> None:
    base, first, second = tiny_base(), PrefixCache(tmp_path), PrefixCache(tmp_path)
    assert same(hidden(base, first), hidden(base, second))


def test_a_disk_that_fills_up_costs_time_and_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    base, prefix = tiny_base(), PrefixCache(tmp_path)
    monkeypatch.setattr("worker.training.generations.Generations._write", full)
    assert same(hidden(base, prefix), hidden(base, PrefixCache()))
    assert "prefix_cache.not_kept" in caplog.messages


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _overwrite(begin: int, end: int | None = None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        data = bytearray(path.read_bytes())
        last = len(data) if end is None else end
        data[begin:last] = torch.randint(256, (last - begin,), generator=torch.Generator().manual_seed(0)).tolist()
        path.write_bytes(data)

    return write


def _flip_in_the_values(path: Path) -> None:
    data = bytearray(path.read_bytes())
    # Floats near one share their first byte; nothing else in the file repeats it so.
    for index in range(len(data) * 2 // 3, len(data) * 2 // 3 + 64):
        data[index] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [_truncate, _overwrite(0, 8192), _overwrite(8192), _flip_in_the_values],
    ids=["truncated", "header", "pages", "value"],
)
def test_a_damaged_file_costs_time_and_never_gives_wrong_values(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    base, first = tiny_base(), PrefixCache(tmp_path)
    # Large values lie on pages of their own, so that a flipped bit in one breaks nothing that LMDB would notice.
    long = [TokenSequence(tuple(number % 250 for number in range(start, start + 200)), 1) for start in range(8)]
    expected = hidden(base, first, long)
    closed(first)
    (file,) = data_files(tmp_path)
    damage(file)
    second = PrefixCache(tmp_path)
    assert same(hidden(base, second, long), expected)
    assert second.computed > 0
    assert second.computed < len(long) or "prefix_cache.damaged" in caplog.messages
    closed(second)
    third = PrefixCache(tmp_path)
    assert same(hidden(base, third, long), expected)
    assert third.computed == 0  # it was mended


def test_a_run_does_not_depend_on_what_was_cached_before(caplog: pytest.LogCaptureFixture) -> None:
    base, config = tiny_base(), TrainingConfig(max_epochs=3, min_steps=0, preserve=0)
    caplog.set_level(logging.WARNING)
    warm = PrefixCache()
    train(base, EDITS[:1], config, prefix=warm)
    ours = train(base, EDITS, config, prefix=warm).tensors
    fresh = train(base, EDITS, config, prefix=PrefixCache()).tensors
    assert all(torch.equal(ours[name], fresh[name]) for name in fresh)
    assert not caplog.messages
