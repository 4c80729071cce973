import torch
from tiny_models import tiny_base

from worker.model import BaseModel
from worker.training.breadth_first import TrainingConfig, train
from worker.training.encode import TrainingEdit
from worker.training.prefix import PrefixCache

EDITS = [TrainingEdit("a", "one", "uno"), TrainingEdit("b", "two", "dos"), TrainingEdit("c", "three", "tres")]


class ForwardCounter:
    """Counts how often the first decoder layer really runs."""

    def __init__(self, base: BaseModel) -> None:
        self.calls = 0
        base.layers[0].self_attn.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.calls += 1


def test_the_lower_layers_run_once_per_sequence_over_all_epochs_and_runs() -> None:
    base, prefix = tiny_base(), PrefixCache()
    counter = ForwardCounter(base)
    config = TrainingConfig(max_epochs=5, min_steps=0, loss_threshold=0)
    train(base, EDITS, config, prefix=prefix)
    assert counter.calls == 6  # three edits, raw and chat
    train(base, EDITS, config, prefix=prefix)
    assert counter.calls == 6
    train(base, [*EDITS, TrainingEdit("d", "four", "cuatro")], config, prefix=prefix)
    assert counter.calls == 8
    assert len(prefix) == 8


def test_the_least_recently_used_goes_first() -> None:
    base = tiny_base()
    one_sequence = 3 * 32 * 4  # tokens, hidden size, bytes of an fp32
    prefix = PrefixCache(capacity_bytes=2 * one_sequence)
    counter = ForwardCounter(base)
    for token_ids in [(1, 2, 3), (4, 5, 6), (1, 2, 3), (7, 8, 9), (1, 2, 3)]:
        prefix.hidden(base, token_ids)
    assert counter.calls == 3
    assert (len(prefix), prefix.size_bytes) == (2, 2 * one_sequence)
    prefix.hidden(base, (4, 5, 6))
    assert counter.calls == 4


def test_a_sequence_larger_than_the_cache_is_computed_and_not_kept() -> None:
    base, prefix = tiny_base(), PrefixCache(capacity_bytes=10)
    assert prefix.hidden(base, (1, 2, 3)).shape == (3, 32)
    assert (len(prefix), prefix.size_bytes) == (0, 0)


def test_models_and_layers_do_not_share_entries() -> None:
    prefix = PrefixCache()
    bases = [tiny_base(), tiny_base(seed=1), tiny_base(location="model.layers.1.mlp.down_proj")]
    states = [prefix.hidden(base, (1, 2, 3)) for base in bases]
    assert len(prefix) == 3
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_a_run_does_not_depend_on_what_was_cached_before() -> None:
    base, config = tiny_base(), TrainingConfig(max_epochs=3, min_steps=0)
    warm = PrefixCache()
    train(base, EDITS[:1], config, prefix=warm)
    ours = train(base, EDITS, config, prefix=warm).tensors
    fresh = train(base, EDITS, config, prefix=PrefixCache()).tensors
    assert all(torch.equal(ours[name], fresh[name]) for name in fresh)
