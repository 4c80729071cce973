"""Attention over a packed row (worker.training.packing), through transformers' AttentionInterface.

Attention is told where sequences begin and end by the `packing` keyword of the model's forward, which transformers
hands on to it. Every other module has to work on tokens one by one, which worker.training.row_check finds out. No
family of models is named here.

Only here sequences are padded, each to the longest of its group: a long one among many short ones costs a square of
itself for each of them.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, PreTrainedModel

from worker.training.packing import Group, Packing

PACKED_ATTENTION = "errata_packed"


class UnsupportedAttentionError(RuntimeError):
    """The model's attention cannot be computed over packed sequences."""


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's attention read the `packing` keyword of its forward, for the length of one call."""
    usual = model.config._attn_implementation
    model.set_attn_implementation(PACKED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _attend(  # noqa: PLR0913  transformers' own signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row. Query is [1, heads, tokens, size], the result [1, tokens, heads, value's size]."""
    if packing is None:
        raise UnsupportedAttentionError(f"{type(module).__name__} is not told where a packed row's sequences begin")
    if s_aux is not None:
        raise UnsupportedAttentionError(f"{type(module).__name__} has attention sinks, which are not supported")
    if attention_mask is not None:
        raise UnsupportedAttentionError(f"{type(module).__name__} brought a mask of its own to a packed row")
    attend = _Attention(
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap=softcap,
        sliding_window=sliding_window,
    )
    # Split and not sliced: the gradient of a split is one concatenation, that of a slice a row of zeros for each.
    sizes = [size for group in packing.groups for size in (group.template_tokens, sum(group.lengths))]
    padding = packing.tokens - sum(sizes)
    query_parts, key_parts, value_parts = (
        torch.split(states.squeeze(0).transpose(0, 1), [*sizes, padding]) for states in (query, key, value)
    )
    attended: list[Tensor] = []
    for number, group in enumerate(packing.groups):
        template_states, own_states = (
            [parts[2 * number + which] for parts in (query_parts, key_parts, value_parts)] for which in range(2)
        )
        own = [_padded(states, group) for states in own_states]
        if group.template_tokens:
            template = [states.unsqueeze(0) for states in template_states]
            attended.append(attend(*template).squeeze(0))
            count = len(group.lengths)
            own[1:] = (
                torch.cat([before.expand(count, -1, -1, -1), behind], dim=1)
                for before, behind in zip(template[1:], own[1:], strict=True)
            )
        attended.append(_unpadded(attend(*own), group))
    if padding:
        attended.append(attended[0].new_zeros(padding, *attended[0].shape[1:]))
    return torch.cat(attended).unsqueeze(0), None


class _Pad(torch.autograd.Function):
    """Rows, [own tokens, ...], to [sequences, longest, ...]. Its gradient is a gather, where autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, own: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        padded: Tensor = rows.index_select(0, own.flatten()).unflatten(0, own.shape)
        return padded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return gradient.flatten(0, 1).index_select(0, kept), None, None


class _Unpad(torch.autograd.Function):
    """Back from [sequences x longest, ...] to rows."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.length = len(padded)
        return padded.index_select(0, kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.length, *gradient.shape[1:]).index_copy_(0, kept, gradient), None


def _padded(rows: Tensor, group: Group) -> Tensor:
    padded: Tensor = _Pad.apply(rows, group.own, group.kept)  # type: ignore[no-untyped-call]
    return padded


def _unpadded(padded: Tensor, group: Group) -> Tensor:
    rows: Tensor = _Unpad.apply(padded.flatten(0, 1), group.kept)  # type: ignore[no-untyped-call]
    return rows


@dataclass(frozen=True)
class _Attention:
    """Causal attention; the queries are the last of the keys."""

    scale: float
    softcap: float | None
    sliding_window: int | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Query is [sequences, queries, heads, size], key and value [sequences, keys, key heads, its size]."""
        mask = _mask(query.shape[1], key.shape[1], self.sliding_window, query.device)
        if self.softcap is None and query.device.type != "cpu":
            return self.fused(query, key, value, mask)
        return self.plain(query, key, value, mask)

    def fused(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """By a fused kernel, which knows no soft cap.

        Of torch's, cuDNN's prepares itself anew for every shape, and flash attention takes no mask. The one that is
        left wants as many key heads as heads.
        """
        repeats = query.shape[2] // key.shape[2]
        key, value = (states.repeat_interleave(repeats, dim=2) for states in (key, value))
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        return attended.transpose(1, 2)

    def plain(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """By matrix products: for short sequences on a CPU, where the fused kernel's backward takes longer."""
        sequences, queries, heads, _ = query.shape
        groups = key.shape[2]
        # The heads that share a key head are further rows of the same product.
        stacked = (query * self.scale).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        weights = (stacked @ key.permute(0, 2, 3, 1)).float().unflatten(2, (-1, queries))
        if self.softcap is not None:
            weights = self.softcap * torch.tanh(weights / self.softcap)
        weights = weights.masked_fill(~mask, -math.inf).softmax(dim=-1).to(value.dtype).flatten(2, 3)
        attended: Tensor = (weights @ value.transpose(1, 2)).unflatten(2, (-1, queries))
        whole: Tensor = attended.permute(0, 3, 1, 2, 4).reshape(sequences, queries, heads, -1)
        return whole


def _mask(queries: int, keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] bool, true where a query sees a key. The queries are the last of the keys."""
    behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = behind >= 0
    return seen & (behind < sliding_window) if sliding_window is not None else seen


AttentionInterface.register(PACKED_ATTENTION, _attend)
