"""The versioned layers against plain matrix products, token by token, and on as many ranks as may share them."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from worker.delta import tensor_sha256
from worker.inference import layer as layer_module
from worker.inference.fused import matrices_of, module_names
from worker.inference.layer import VersionedColumnParallelLinear, VersionedLayers, VersionedLinear

IN, SLOTS = 16, 3
BASE = -1
QKV = ("q_proj", "k_proj", "v_proj")
# Four heads of two rows, two key heads.
ROWS = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "gate_proj": 12, "up_proj": 12, "qkv_proj": 16, "gate_up_proj": 24}
HEADS = {"head_size": 2, "v_head_size": 2, "total_num_heads": 4, "total_num_kv_heads": 2}


class PlainLinear:
    """vLLM's quantisation method, reduced to what it does for an unquantised layer."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, layer.weight, bias)


@dataclass(frozen=True)
class Kind:
    """A layer of vLLM: its class, its name there, what the checkpoint has of it and which of that is tuned."""

    plain: type[LinearBase]
    name: str
    members: tuple[str, ...]
    tuned: tuple[str, ...]

    @property
    def is_fused(self) -> bool:
        return len(self.members) > 1


def kind(plain: type[LinearBase], name: str, members: tuple[str, ...] = (), tuned: tuple[str, ...] = ()) -> object:
    members = members or (name,)
    return pytest.param(Kind(plain, name, members, tuned or members), id=f"{name} {plain.__name__} {'+'.join(tuned)}")


GATE_UP = ("gate_proj", "up_proj")
KINDS = [
    kind(RowParallelLinear, "down_proj"),
    kind(ColumnParallelLinear, "fc1"),
    kind(ReplicatedLinear, "dense"),
    kind(QKVParallelLinear, "qkv_proj", QKV),
    *(kind(QKVParallelLinear, "qkv_proj", QKV, (name,)) for name in QKV),
    kind(QKVParallelLinear, "qkv_proj"),
    kind(MergedColumnParallelLinear, "gate_up_proj", GATE_UP),
    *(kind(MergedColumnParallelLinear, "gate_up_proj", GATE_UP, (name,)) for name in GATE_UP),
    kind(MergedColumnParallelLinear, "gate_up_proj"),
]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def version_of(kind: Kind, seed: int) -> dict[str, Tensor]:
    """All matrices of a layer; those that are not tuned are the base's, seed 0."""
    return {
        name: random(ROWS.get(name, 8), IN, seed=100 * place + (seed if name in kind.tuned else 0))
        for place, name in enumerate(kind.members)
    }


def shard(kind: Kind, whole: dict[str, Tensor], tp_size: int, tp_rank: int) -> Tensor:
    """The base layer's weight on one rank, as vLLM loads it: heads and halves cut part by part."""
    matrix = torch.cat(list(whole.values()))
    if kind.plain is RowParallelLinear:
        return matrix.chunk(tp_size, dim=1)[tp_rank]
    if kind.plain is ReplicatedLinear:
        return matrix
    rows = {QKVParallelLinear: [8, 4, 4], MergedColumnParallelLinear: [12, 12]}.get(kind.plain, [8])
    parts = matrix.split(rows)
    if kind.plain is QKVParallelLinear:
        heads = [2 * max(1, number // tp_size) for number in (4, 2, 2)]
        first = [2 * (tp_rank * number // tp_size) for number in (4, 2, 2)]
        return torch.cat([part[at : at + size] for part, at, size in zip(parts, first, heads, strict=True)])
    return torch.cat([part.chunk(tp_size)[tp_rank] for part in parts])


def base_layer(kind: Kind, tp_size: int = 1, tp_rank: int = 0) -> LinearBase:
    """A layer of vLLM without its constructor, which wants a whole engine around it."""
    layer = kind.plain.__new__(kind.plain)
    nn.Module.__init__(layer)
    weight = shard(kind, version_of(kind, 0), tp_size, tp_rank)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.prefix = f"model.layers.2.{kind.name}"
    layer.input_size, layer.output_size = IN, sum(matrix.size(0) for matrix in version_of(kind, 0).values())
    layer.input_size_per_partition, layer.output_size_per_partition = weight.size(1), weight.size(0)
    layer.tp_size, layer.tp_rank = tp_size, tp_rank
    layer.quant_method = PlainLinear()
    layer.output_sizes = [12, 12]
    for name, value in HEADS.items():
        setattr(layer, name, value)
    layer.num_heads, layer.num_kv_heads = 4 // tp_size, max(1, 2 // tp_size)
    layer.num_kv_head_replicas = max(1, tp_size // 2)
    return layer


def wrap(kind: Kind, tp_size: int = 1, tp_rank: int = 0) -> VersionedLinear:
    layers = VersionedLayers({f"model.layers.2.{name}.weight" for name in kind.tuned})
    base = base_layer(kind, tp_size, tp_rank)
    members = list(kind.members) if kind.is_fused else []
    assert layers.can_replace_layer(source_layer=base, packed_modules_list=members, lora_config=None)
    return layers(base)


def versioned(kind: Kind, slot_of_token: list[int], *, tp_size: int = 1, tp_rank: int = 0) -> VersionedLinear:
    layer = wrap(kind, tp_size, tp_rank)
    layer.create_lora_weights(SLOTS, SimpleNamespace(lora_dtype=torch.float32, max_lora_rank=1))
    # Longer than the batch, as vLLM's buffer is, with a slot in the part that must not be read.
    layer.set_mapping(SimpleNamespace(_token_lora_indices=torch.tensor([*slot_of_token, 1, 1])))
    return layer


def set_version(layer: VersionedLinear, kind: Kind, slot: int, seed: int) -> None:
    given = [matrix if name in kind.tuned else None for name, matrix in version_of(kind, seed).items()]
    layer.set_lora(slot, given if kind.is_fused else given[0], None)


def tuned_of(kind: Kind, seed: int) -> dict[str, Tensor]:
    return {f"model.layers.2.{name}.weight": version_of(kind, seed)[name] for name in kind.tuned}


DOWN = Kind(RowParallelLinear, "down_proj", ("down_proj",), ("down_proj",))


MIXED = [1, BASE, 0, 1, BASE, 2, 0]


@pytest.mark.parametrize("slot_of_token", [MIXED, [1, 0, 1], [2, 2, 2], [BASE, BASE]])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_computed_by_its_own_version(kind: Kind, slot_of_token: list[int]) -> None:
    layer = versioned(kind, slot_of_token)
    for slot in range(SLOTS):
        set_version(layer, kind, slot, seed=slot + 1)

    matrices = {slot: torch.cat(list(version_of(kind, slot + 1).values())) for slot in (BASE, *range(SLOTS))}
    x, bias = random(len(slot_of_token), IN, seed=9), random(matrices[BASE].size(0), seed=10)
    expected = torch.stack([matrices[slot] @ token + bias for slot, token in zip(slot_of_token, x, strict=True)])
    torch.testing.assert_close(layer.apply(x, bias), expected)
    # The transformers backend adds a dimension in front.
    torch.testing.assert_close(layer.apply(x.unsqueeze(0), bias), expected.unsqueeze(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_that_no_token_uses_is_not_computed(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = versioned(kind, MIXED[:3])
    set_version(layer, kind, 0, seed=1)
    multiplied: list[int] = []
    linear = torch.nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        multiplied.append(weight.data_ptr())
        return linear(x, weight, bias)

    monkeypatch.setattr(layer_module.F, "linear", counted)
    layer.apply(random(3, IN, seed=9))
    base = layer.base_layer.weight.data_ptr()
    assert multiplied == [base, *(layer.slots[slot].data_ptr() for slot in (0, 1))]

    multiplied.clear()
    layer.set_mapping(SimpleNamespace(_token_lora_indices=torch.tensor([2, 2])))
    layer.apply(random(2, IN, seed=9))
    needs_base = [] if len(kind.tuned) == len(kind.members) else [base]
    assert multiplied == [*needs_base, layer.slots[2].data_ptr()]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_tuned_is_the_base_layers_to_the_last_bit(kind: Kind) -> None:
    layer = versioned(kind, [BASE, 0])
    layer.slots.fill_(torch.nan)
    x = random(2, IN, seed=9)
    answered, plain = layer.apply(x), torch.nn.functional.linear(x, layer.base_layer.weight)
    assert torch.equal(answered[0], plain[0])
    rows = [name in kind.tuned for name, matrix in version_of(kind, 0).items() for _ in range(matrix.size(0))]
    assert torch.equal(answered[1].isnan(), torch.tensor(rows))
    assert torch.equal(answered[1][~torch.tensor(rows)], plain[1][~torch.tensor(rows)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_slot_holds_its_version_alone_by_the_checkpoints_names(kind: Kind) -> None:
    layer = versioned(kind, [0])
    for seed in (1, 2):
        set_version(layer, kind, 0, seed)
        read = layer.read_slot(0)
        assert read.keys() == tuned_of(kind, seed).keys()
        assert {name: tensor_sha256(matrix) for name, matrix in read.items()} == {
            name: tensor_sha256(matrix) for name, matrix in tuned_of(kind, seed).items()
        }
    layer.reset_lora(0)
    assert all(torch.equal(matrix, torch.zeros_like(matrix)) for matrix in layer.read_slot(0).values())


def test_a_version_outlives_the_tensor_it_was_loaded_from() -> None:
    layer = versioned(DOWN, [0])
    matrix = random(8, IN, seed=1)
    layer.set_lora(0, matrix, None)
    matrix.zero_()
    assert torch.equal(layer.read_slot(0)["model.layers.2.down_proj.weight"], random(8, IN, seed=1))


@pytest.mark.parametrize("shape", [(8, IN + 1), (8, IN - 1), (2, IN), (8, 1), (IN, 8)])
def test_a_matrix_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    layer = versioned(DOWN, [0])
    set_version(layer, DOWN, 0, seed=1)
    with pytest.raises(ValueError, match=r"slot 0 holds matrices of the shapes \[\(8, 16\)\]"):
        layer.set_lora(0, torch.zeros(shape), None)
    assert torch.equal(*(next(iter(found.values())) for found in (layer.read_slot(0), tuned_of(DOWN, 1))))


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_a_version_that_lacks_a_matrix_of_a_fused_layer_is_refused(dropped: int) -> None:
    fused = Kind(QKVParallelLinear, "qkv_proj", QKV, QKV)
    layer = versioned(fused, [0])
    given: list[Tensor | None] = list(version_of(fused, 1).values())
    given[dropped] = None
    with pytest.raises(ValueError, match="holds matrices of the shapes"):
        layer.set_lora(0, given, None)


@pytest.mark.parametrize("kind", KINDS)
def test_vllms_warm_up_adapter_leaves_the_slot_empty(kind: Kind) -> None:
    layer = versioned(kind, [0])
    set_version(layer, kind, 0, seed=1)
    # Of the dimensions that vLLM reads off these attributes.
    assert len(layer.lora_a_stacked) == len(layer.lora_b_stacked) == layer.n_slices
    warm_up = [torch.zeros(1, stacked.shape[-1]) for stacked in layer.lora_a_stacked]
    layer.set_lora(0, warm_up if kind.is_fused else warm_up[0], None)
    assert not layer.slots[0].any()


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_together_compute_and_read_back_the_whole_version(
    kind: Kind, tp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [versioned(kind, [0], tp_size=tp_size, tp_rank=rank) for rank in range(tp_size)]
    for layer in layers:
        set_version(layer, kind, 0, seed=1)

    x = random(1, IN, seed=9)
    for rank, layer in enumerate(layers):
        local = x.chunk(tp_size, dim=1)[rank] if kind.plain is RowParallelLinear else x
        expected = local @ shard(kind, version_of(kind, 1), tp_size, rank).T
        torch.testing.assert_close(layer.apply(local), expected)

    monkeypatch.setattr(layer_module, "tensor_model_parallel_all_gather", gather_over(layers))
    read = layers[0].read_slot(0)
    assert read.keys() == tuned_of(kind, 1).keys()
    assert all(torch.equal(read[name], matrix) for name, matrix in tuned_of(kind, 1).items())


def gather_over(layers: list[VersionedLinear]) -> Callable[..., Tensor]:
    """vLLM's collective, over the slots of layers that stand for ranks: all of them hold version 1 in slot 0."""
    places = iter(range(len(layers[0]._places(0))))

    def all_gather(_: Tensor, dim: int) -> Tensor:
        place = next(places)
        return torch.cat([layer._places(0)[place] for layer in layers], dim=dim)

    return all_gather


@pytest.mark.parametrize("kind", KINDS)
def test_the_compiled_layer_computes_the_same(kind: Kind) -> None:
    layer = versioned(kind, [1, BASE, 0])
    for slot in range(SLOTS):
        set_version(layer, kind, slot, seed=slot + 1)
    x = random(3, IN, seed=9)
    torch._dynamo.reset()  # the graphs of other kinds count against the limit on compiling one function anew
    compiled = torch.compile(layer.apply, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer.apply(x))


def test_layers_without_a_tuned_matrix_are_left_to_vllm() -> None:
    layers = VersionedLayers({"model.layers.3.down_proj.weight", "model.layers.2.other.weight"})
    assert not layers.can_replace_layer(source_layer=base_layer(DOWN), packed_modules_list=[])
    assert not layers.can_replace_layer(source_layer=nn.Linear(2, 2), packed_modules_list=[])
    fused = base_layer(Kind(QKVParallelLinear, "qkv_proj", QKV, QKV))
    assert not layers.can_replace_layer(source_layer=fused, packed_modules_list=list(QKV))


def test_a_layer_with_a_forward_of_its_own_is_left_to_vllm() -> None:
    class Special(RowParallelLinear):
        pass

    special = Kind(Special, "down_proj", ("down_proj",), ("down_proj",))
    layers = VersionedLayers({"model.layers.2.down_proj.weight"})
    assert not layers.can_replace_layer(source_layer=base_layer(special), packed_modules_list=[])


@pytest.mark.parametrize("stacked", [["k_proj", "q_proj", "v_proj"], ["q_proj", "k_proj"], []])
def test_a_layer_that_is_fused_otherwise_is_left_to_vllm(stacked: list[str]) -> None:
    layers = VersionedLayers({"model.layers.2.k_proj.weight"})
    fused = base_layer(Kind(QKVParallelLinear, "qkv_proj", QKV, ("k_proj",)))
    assert layers.can_replace_layer(source_layer=fused, packed_modules_list=list(QKV))
    assert not layers.can_replace_layer(source_layer=fused, packed_modules_list=stacked)


def test_the_names_of_modules_are_those_of_matrices_and_of_what_fuses_them() -> None:
    assert module_names(["h.1.attn.k_proj.weight", "h.1.mlp.up_proj.weight", "h.1.mlp.fc2.weight"]) == [
        "h.1.attn.k_proj",
        "h.1.attn.qkv_proj",
        "h.1.mlp.fc2",
        "h.1.mlp.gate_up_proj",
        "h.1.mlp.up_proj",
    ]


def test_a_fused_layer_of_the_checkpoint_is_one_matrix() -> None:
    assert matrices_of("h.1.qkv_proj", {"h.1.qkv_proj.weight"}) == ("h.1.qkv_proj.weight",)
    assert matrices_of("h.1.qkv_proj", {"h.1.k_proj.weight"}) == (None, "h.1.k_proj.weight", None)
    assert matrices_of("h.1.qkv_proj", {"h.11.k_proj.weight"}) == (None, None, None)
    assert matrices_of("h.1.o_proj", {"h.1.k_proj.weight"}) == ()


def test_only_the_column_parallel_layer_has_several_parts() -> None:
    assert wrap(Kind(QKVParallelLinear, "qkv_proj", QKV, QKV)).n_slices == 3
    assert isinstance(wrap(Kind(ColumnParallelLinear, "fc1", ("fc1",), ("fc1",))), VersionedColumnParallelLinear)
