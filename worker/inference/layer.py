"""The tuned layer: vLLM's row-parallel linear layer with a whole replacement matrix in each adapter slot."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor, nn
from typing_extensions import override
from vllm.config.lora import LoRAConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.lora.layers import RowParallelLinearWithLoRA
from vllm.model_executor.custom_op import maybe_get_oot_by_class
from vllm.model_executor.layers.linear import RowParallelLinear


class VersionedRowParallelLinear(RowParallelLinearWithLoRA):
    """A linear layer that computes each token with the matrix of its own request's version.

    To vLLM a version is a LoRA adapter whose A matrix is the full replacement `[out, in]` and whose B matrix means
    nothing; so vLLM routes requests, keeps slots and evicts them as it does for adapters. Tokens without an adapter
    get the base layer's output, untouched.
    """

    slots: Tensor
    """`[max_loras, out, in / tensor parallel size]`, in the dtype of the model's adapters."""

    @classmethod
    @override
    def can_replace_layer(
        cls, source_layer: nn.Module, lora_config: LoRAConfig, packed_modules_list: list[str], model_config: Any = None
    ) -> bool:
        """Take any row-parallel layer: vLLM wraps only those that --lora-target-modules names."""
        return type(source_layer) is maybe_get_oot_by_class(RowParallelLinear)

    @override
    def create_lora_weights(self, max_loras: int, lora_config: LoRAConfig, model_config: Any = None) -> None:
        """Allocate the slots; unlike an adapter's they hold whole matrices, so the rank does not matter."""
        dtype = lora_config.lora_dtype
        assert isinstance(dtype, torch.dtype)  # noqa: S101  vLLM has resolved "auto" by now
        self.slots = torch.zeros(max_loras, self.output_size, self.input_size, dtype=dtype, device=self.device)
        # Only looked at, for the dimensions of the adapters that vLLM warms up with.
        self.lora_a_stacked = (self.slots.new_empty(0, 1, lora_config.max_lora_rank, self.input_size),)
        self.lora_b_stacked = (self.slots.new_empty(0, 1, self.output_size, lora_config.max_lora_rank),)

    @override
    def set_lora(self, index: int, lora_a: Tensor, lora_b: Tensor) -> None:  # type: ignore[override]  # never a list here
        """Put the version's matrix `lora_a`, `[out, in]`, into slot `index`. Raises ValueError on another shape.

        An adapter of the nominal rank is vLLM's own, for warming up, and leaves the slot empty.
        """
        if lora_a.shape == self.lora_a_stacked[0].shape[-2:]:
            self.reset_lora(index)
            return
        expected = (self.output_size, self.input_size * self.tp_size)
        # Slicing and copying would truncate and broadcast: a matrix would then be served that nobody trained.
        if lora_a.shape != expected:
            raise ValueError(f"slot {index} holds a matrix of shape {expected}, not {tuple(lora_a.shape)}")
        self.slots[index].copy_(self.slice_lora_a(lora_a), non_blocking=True)

    @override
    def reset_lora(self, index: int) -> None:
        """Empty a slot."""
        self.slots[index].zero_()

    @override
    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]  # as vLLM does
        """Return `[…, tokens, out]` for `x`, `[…, tokens, in]`: each token by its version's matrix or by the base.

        Every slot is computed for every token, which keeps the graph static for compilation and CUDA graphs.
        """
        output = self._get_quant_method().apply(self.base_layer, x, bias)
        tokens = x.numel() // x.size(-1)
        slot_of_token = self.punica_wrapper._token_lora_indices[:tokens].view(*x.shape[:-1], 1)
        for slot in range(self.slots.size(0)):
            output = torch.where(slot_of_token == slot, F.linear(x, self.slots[slot], bias), output)
        return output

    def read_slot(self, index: int) -> Tensor:
        """Return the whole matrix `[out, in]` in slot `index`; under tensor parallelism every rank must call this."""
        matrix = self.slots[index]
        return tensor_model_parallel_all_gather(matrix, dim=-1) if self.tp_size > 1 else matrix
