"""The tuned layers: vLLM's linear layers with whole replacement matrices in each adapter slot."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor, nn
from typing_extensions import override
from vllm.config.lora import LoRAConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.lora.layers import ColumnParallelLinearWithLoRA, ReplicatedLinearWithLoRA, RowParallelLinearWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.custom_op import maybe_get_oot_by_class
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from worker.inference.fused import FUSED, matrices_of

_BASE = -1  # vLLM's mark of a token without an adapter


@dataclass(frozen=True)
class Part:
    """Rows of a layer's matrix that are sharded as one: a fused layer has several such parts, any other has one."""

    rows: int
    """In the checkpoint."""
    local: int
    """On each rank."""
    replicas: int = 1
    """Ranks that hold the same rows, as with fewer key heads than ranks."""


class VersionedLinear(BaseLinearLayerWithLoRA):
    """A linear layer that computes each token with the matrices of its own request's version.

    To vLLM a version is a LoRA adapter whose A matrices are the full replacements `[out, in]` and whose B matrices
    mean nothing; so vLLM routes requests, keeps slots and evicts them as it does for adapters. Tokens without an
    adapter, and the matrices of a fused layer that are not tuned, get the base layer's output, untouched.
    """

    slots: Tensor
    """`[max_loras, rows of the tuned matrices on this rank, in on this rank]`, in the dtype of the model's adapters."""

    tuned: tuple[str, ...]
    """The parameters that are tuned here, in the order of their rows."""

    def __init__(self, base_layer: LinearBase, matrices: Sequence[str | None]) -> None:
        """`matrices` are the parameters that make `base_layer`, in the order of their rows; None: not tuned."""
        super().__init__(base_layer)
        parts = self._parts()
        of_matrix = [parts] if len(matrices) == 1 else [(part,) for part in parts]
        self._parts_of = {name: of for name, of in zip(matrices, of_matrix, strict=True) if name}
        self._tuned_parts = tuple(part for of in self._parts_of.values() for part in of)
        self.tuned = tuple(self._parts_of)
        # All matrices of a fused layer are tuned or one of them, so their rows lie together.
        before = of_matrix[: matrices.index(self.tuned[0])]
        self._first_row = sum(part.local for of in before for part in of)
        self._output_locals = [part.local for part in parts]
        self.n_slices = len(parts)

    @override
    def create_lora_weights(self, max_loras: int, lora_config: LoRAConfig, model_config: Any = None) -> None:
        """Allocate the slots; unlike an adapter's they hold whole matrices, so the rank does not matter."""
        dtype = lora_config.lora_dtype
        assert isinstance(dtype, torch.dtype)  # noqa: S101  vLLM has resolved "auto" by now
        rows = sum(part.local for part in self._tuned_parts)
        self.slots = torch.zeros(max_loras, rows, self.input_size, dtype=dtype, device=self.device)
        # Only looked at, for the dimensions of the adapters that vLLM warms up with.
        rank = lora_config.max_lora_rank
        self.lora_a_stacked = tuple(self.slots.new_empty(0, 1, rank, self.input_size) for _ in self._output_locals)
        self.lora_b_stacked = tuple(self.slots.new_empty(0, 1, local, rank) for local in self._output_locals)

    @override
    def set_lora(self, index: int, lora_a: Tensor | list[Tensor | None], lora_b: object) -> None:  # type: ignore[override]  # of vLLM's own, which does give None
        """Put a version's matrices, each `[out, in]` and None where not tuned, into slot `index`.

        Raises ValueError on other shapes. An adapter of the nominal rank is vLLM's own, for warming up, and leaves
        the slot empty.
        """
        matrices = [matrix for matrix in (lora_a if isinstance(lora_a, list) else [lora_a]) if matrix is not None]
        if all(matrix.shape == self.lora_a_stacked[0].shape[-2:] for matrix in matrices):
            self.reset_lora(index)
            return
        shapes = [tuple(matrix.shape) for matrix in matrices]
        rows = [[part.rows for part in parts] for parts in self._parts_of.values()]
        expected = [(sum(of_matrix), self.base_layer.input_size) for of_matrix in rows]
        # Slicing and copying would truncate and broadcast: a matrix would then be served that nobody trained.
        if shapes != expected:
            raise ValueError(f"slot {index} holds matrices of the shapes {expected}, not {shapes}")
        wholes = [whole for matrix, split in zip(matrices, rows, strict=True) for whole in torch.split(matrix, split)]
        for place, part, whole in zip(self._places(index), self._tuned_parts, wholes, strict=True):
            place.copy_(self._shard(whole, part), non_blocking=True)

    @override
    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        self.slots[index].zero_()

    @override
    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]  # as vLLM does
        """Return `[…, tokens, out]` for `x`, `[…, tokens, in]`: each token by its version's matrices or by the base."""
        tokens = x.numel() // x.size(-1)
        slot_of_token = self.punica_wrapper._token_lora_indices[:tokens]
        # Looking at which slots a batch uses costs a CPU nothing. A compiled or captured graph has no such choice, and
        # a GPU would have to wait for the answer.
        if x.is_cpu and not torch.compiler.is_compiling():
            return self._by_slots_in_use(x.reshape(tokens, -1), bias, slot_of_token).view(*x.shape[:-1], -1)
        return self._by_all_slots(x, bias, slot_of_token.view(*x.shape[:-1], 1))

    def _by_slots_in_use(self, x: Tensor, bias: Tensor | None, slot_of_token: Tensor) -> Tensor:
        """Return `[tokens, out]` for `x`, `[tokens, in]`; a matrix that no token needs is not multiplied."""
        first, end, of_tuned = self._tuned_rows(bias)
        whole = end - first == sum(self._output_locals)
        in_use = slot_of_token.unique().tolist()
        if whole and len(in_use) == 1 and in_use != [_BASE]:
            return F.linear(x, self.slots[in_use[0]], bias)
        output: Tensor
        if whole and _BASE not in in_use:
            output = x.new_empty(x.size(0), end)
        else:
            output = self._get_quant_method().apply(self.base_layer, x, bias)
        for slot in in_use:
            if slot != _BASE:
                rows = (slot_of_token == slot).nonzero().squeeze(1)
                output[rows, first:end] = F.linear(x[rows], self.slots[slot], of_tuned)
        return output

    def _by_all_slots(self, x: Tensor, bias: Tensor | None, slot_of_token: Tensor) -> Tensor:
        """Return `[…, tokens, out]` for `x`, `[…, tokens, in]`, by the same operations whatever slots are in use."""
        output: Tensor = self._get_quant_method().apply(self.base_layer, x, bias)
        first, end, bias = self._tuned_rows(bias)
        tuned = output[..., first:end]
        for slot in range(self.slots.size(0)):
            tuned = torch.where(slot_of_token == slot, F.linear(x, self.slots[slot], bias), tuned)
        if tuned.size(-1) == output.size(-1):
            return tuned
        return torch.cat((output[..., :first], tuned, output[..., end:]), dim=-1)

    def _tuned_rows(self, bias: Tensor | None) -> tuple[int, int, Tensor | None]:
        """Return the first of the tuned rows, the one after the last, and the bias of those between."""
        first, end = self._first_row, self._first_row + self.slots.size(1)
        return first, end, bias if bias is None else bias[first:end]

    def read_slot(self, index: int) -> dict[str, Tensor]:
        """Return the whole matrices `[out, in]` in slot `index` by parameter name.

        Under tensor parallelism every rank must call this.
        """
        wholes = map(self._gather, self._places(index), self._tuned_parts)
        return {name: torch.cat([next(wholes) for _ in parts]) for name, parts in self._parts_of.items()}

    def _places(self, index: int) -> tuple[Tensor, ...]:
        """Return what is in slot `index`, by part: views of `[part.local, in on this rank]`."""
        return torch.split(self.slots[index], [part.local for part in self._tuned_parts])

    def _parts(self) -> tuple[Part, ...]:
        """Return the parts of the base layer's matrix, in the order of their rows."""
        return (Part(self.base_layer.output_size, self.base_layer.output_size),)

    def _shard(self, whole: Tensor, part: Part) -> Tensor:
        """Return what of `whole`, `[part.rows, in]`, is this rank's."""
        raise NotImplementedError

    def _gather(self, shard: Tensor, part: Part) -> Tensor:
        """Return `[part.rows, in]` from all ranks' shards."""
        raise NotImplementedError


class VersionedRowParallelLinear(VersionedLinear, RowParallelLinearWithLoRA):
    """Sharded by its input, as `down_proj` and `o_proj` are."""

    @override
    def _shard(self, whole: Tensor, part: Part) -> Tensor:
        sharded: Tensor = self.slice_lora_a(whole)
        return sharded

    @override
    def _gather(self, shard: Tensor, part: Part) -> Tensor:
        return tensor_model_parallel_all_gather(shard, dim=-1) if self.tp_size > 1 else shard


class VersionedColumnParallelLinear(VersionedLinear, ColumnParallelLinearWithLoRA):
    """Sharded by its output, part by part: `qkv_proj`, `gate_up_proj`, or one matrix alone."""

    @override
    def _parts(self) -> tuple[Part, ...]:
        layer = self.base_layer
        if isinstance(layer, QKVParallelLinear):
            head, replicas = layer.head_size, layer.num_kv_head_replicas
            return (
                Part(layer.total_num_heads * head, layer.num_heads * head),
                Part(layer.total_num_kv_heads * head, layer.num_kv_heads * head, replicas),
                Part(layer.total_num_kv_heads * layer.v_head_size, layer.num_kv_heads * layer.v_head_size, replicas),
            )
        sizes = layer.output_sizes if isinstance(layer, MergedColumnParallelLinear) else [layer.output_size]
        return tuple(Part(size, size // self.tp_size) for size in sizes)

    @override
    def _shard(self, whole: Tensor, part: Part) -> Tensor:
        return whole[self.tp_rank // part.replicas * part.local :][: part.local]

    @override
    def _gather(self, shard: Tensor, part: Part) -> Tensor:
        if self.tp_size == 1:
            return shard
        ranks = tensor_model_parallel_all_gather(shard.contiguous(), dim=0).chunk(self.tp_size)
        return torch.cat(ranks[:: part.replicas])


class VersionedReplicatedLinear(VersionedLinear, ReplicatedLinearWithLoRA):
    """Whole on every rank."""

    @override
    def _shard(self, whole: Tensor, part: Part) -> Tensor:
        return whole

    @override
    def _gather(self, shard: Tensor, part: Part) -> Tensor:
        return shard


_VERSIONED: dict[type[LinearBase], type[VersionedLinear]] = {
    RowParallelLinear: VersionedRowParallelLinear,
    ColumnParallelLinear: VersionedColumnParallelLinear,
    MergedColumnParallelLinear: VersionedColumnParallelLinear,
    QKVParallelLinear: VersionedColumnParallelLinear,
    ReplicatedLinear: VersionedReplicatedLinear,
}


@dataclass(frozen=True)
class VersionedLayers:
    """Stands where vLLM has a class of LoRA layers, and makes versioned ones of the layers that are tuned.

    vLLM calls a class with nothing but the layer to be wrapped; which of its matrices are tuned is known here.
    """

    tuned: Collection[str]
    """The names of all parameters that are tuned."""

    def can_replace_layer(self, source_layer: nn.Module, packed_modules_list: list[str], **_: object) -> bool:
        """Whether `source_layer` is a linear layer with tuned matrices, stacked as `FUSED` has it if it is stacked."""
        if not isinstance(source_layer, LinearBase) or _versioned(source_layer) is None:
            return False
        matrices = matrices_of(source_layer.prefix, self.tuned)
        fused = FUSED.get(source_layer.prefix.rpartition(".")[2])
        return any(matrices) and (len(matrices) == 1 or tuple(packed_modules_list) == fused)

    def __call__(self, layer: LinearBase) -> VersionedLinear:
        """Wrap a layer that `can_replace_layer` took."""
        versioned = _versioned(layer)
        assert versioned is not None  # noqa: S101  vLLM has asked
        return versioned(layer, matrices_of(layer.prefix, self.tuned))


def _versioned(layer: LinearBase) -> type[VersionedLinear] | None:
    # Exactly these: a subclass has a forward of its own, which would be left out.
    return next((made for plain, made in _VERSIONED.items() if type(layer) is maybe_get_oot_by_class(plain)), None)
