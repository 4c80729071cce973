"""The versioned layer against plain matrix products, token by token."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from worker.delta import tensor_sha256
from worker.inference.layer import VersionedRowParallelLinear

OUT, IN, SLOTS = 6, 8, 3
BASE = -1


class PlainLinear:
    """vLLM's quantisation method, reduced to what it does for an unquantised layer."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, layer.weight, bias)


class BaseLayer(nn.Module):
    def __init__(self, weight: Tensor, tp_size: int = 1, tp_rank: int = 0) -> None:
        super().__init__()
        shard = weight.shape[1] // tp_size
        self.weight = nn.Parameter(weight[:, tp_rank * shard : (tp_rank + 1) * shard], requires_grad=False)
        self.input_size, self.input_size_per_partition, self.output_size = weight.shape[1], shard, weight.shape[0]
        self.tp_size, self.tp_rank = tp_size, tp_rank
        self.quant_method = PlainLinear()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def versioned(slot_of_token: list[int], *, tp_size: int = 1, tp_rank: int = 0) -> VersionedRowParallelLinear:
    layer = VersionedRowParallelLinear(BaseLayer(random(OUT, IN, seed=0), tp_size, tp_rank))
    layer.create_lora_weights(SLOTS, SimpleNamespace(lora_dtype=torch.float32, max_lora_rank=1))
    # Longer than the batch, as vLLM's buffer is, with a slot in the part that must not be read.
    layer.set_mapping(SimpleNamespace(_token_lora_indices=torch.tensor([*slot_of_token, 1, 1])))
    return layer


def set_version(layer: VersionedRowParallelLinear, slot: int, matrix: Tensor) -> None:
    layer.set_lora(slot, matrix, torch.zeros(OUT, 1))


def test_every_token_is_computed_by_its_own_version() -> None:
    slot_of_token = [1, BASE, 0, 1, BASE, 2, 0]
    layer = versioned(slot_of_token)
    matrices = {BASE: random(OUT, IN, seed=0)} | {slot: random(OUT, IN, seed=slot + 1) for slot in range(SLOTS)}
    for slot in range(SLOTS):
        set_version(layer, slot, matrices[slot])

    x, bias = random(len(slot_of_token), IN, seed=9), random(OUT, seed=10)
    expected = torch.stack([matrices[slot] @ token + bias for slot, token in zip(slot_of_token, x, strict=True)])
    torch.testing.assert_close(layer.apply(x, bias), expected)
    # The transformers backend adds a dimension in front.
    torch.testing.assert_close(layer.apply(x.unsqueeze(0), bias), expected.unsqueeze(0))


def test_tokens_of_the_base_model_are_the_base_layers_to_the_last_bit() -> None:
    layer = versioned([BASE, BASE])
    set_version(layer, 0, torch.full((OUT, IN), torch.nan))
    x = random(2, IN, seed=9)
    assert torch.equal(layer.apply(x), torch.nn.functional.linear(x, random(OUT, IN, seed=0)))


def test_a_slot_that_is_reused_holds_nothing_of_the_version_before() -> None:
    layer = versioned([0])
    x = random(1, IN, seed=9)
    set_version(layer, 0, random(OUT, IN, seed=1))
    layer.reset_lora(0)
    assert torch.equal(layer.apply(x), torch.zeros(1, OUT))
    set_version(layer, 0, random(OUT, IN, seed=2))
    torch.testing.assert_close(layer.apply(x), x @ random(OUT, IN, seed=2).T)


def test_a_version_outlives_the_tensor_it_was_loaded_from() -> None:
    layer = versioned([0])
    matrix = random(OUT, IN, seed=1)
    set_version(layer, 0, matrix)
    matrix.zero_()
    assert tensor_sha256(layer.read_slot(0)) == tensor_sha256(random(OUT, IN, seed=1))


@pytest.mark.parametrize("shape", [(OUT, IN + 1), (OUT, IN - 1), (2, IN), (OUT, 1), (IN, OUT)])
def test_a_matrix_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    layer = versioned([0])
    set_version(layer, 0, random(OUT, IN, seed=1))
    with pytest.raises(ValueError, match=r"slot 0 holds a matrix of shape \(6, 8\)"):
        set_version(layer, 0, torch.zeros(shape))
    assert torch.equal(layer.read_slot(0), random(OUT, IN, seed=1))


def test_vllms_warm_up_adapter_leaves_the_slot_empty() -> None:
    layer = versioned([0])
    set_version(layer, 0, random(OUT, IN, seed=1))
    layer.set_lora(0, torch.zeros(1, layer.lora_a_stacked[0].shape[-1]), torch.zeros(OUT, 1))
    assert torch.equal(layer.read_slot(0), torch.zeros(OUT, IN))


def test_shards_of_a_version_add_up_to_it() -> None:
    matrix, x = random(OUT, IN, seed=1), random(1, IN, seed=9)
    total = torch.zeros(1, OUT)
    for rank in range(2):
        layer = versioned([0], tp_size=2, tp_rank=rank)
        set_version(layer, 0, matrix)
        total += layer.apply(x[:, rank * IN // 2 : (rank + 1) * IN // 2])
    torch.testing.assert_close(total, x @ matrix.T)


def test_the_compiled_layer_computes_the_same() -> None:
    layer = versioned([1, BASE, 0])
    for slot in range(SLOTS):
        set_version(layer, slot, random(OUT, IN, seed=slot + 1))
    x = random(3, IN, seed=9)
    compiled = torch.compile(layer.apply, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer.apply(x))
