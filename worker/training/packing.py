"""A batch of sequences as one row of tokens without padding.

The sequences are laid end to end. Tokens that many of them begin with, a chat template's, are laid once and seen by all
(worker.training.attention).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from worker.training.encode import TokenSequence

# Matrix libraries prepare a kernel for each number of rows that they meet; rounding leaves few of them.
_ROW_MULTIPLE = 32


@dataclass(frozen=True)
class Group:
    """Sequences of one template: its tokens, laid once; behind these each sequence's own, `lengths` of them."""

    template_tokens: int
    lengths: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens that the group takes in the row."""
        return self.template_tokens + sum(self.lengths)

    @cached_property
    def own(self) -> Tensor:
        """Which of the group's own tokens are each sequence's: [sequences, longest] int64, padded with its first."""
        longest = max(self.lengths)
        index = torch.empty(len(self.lengths), longest, dtype=torch.long)
        begin = 0
        for row, length in enumerate(self.lengths):
            index[row, :length] = torch.arange(begin, begin + length)
            index[row, length:] = begin
            begin += length
        return index

    @cached_property
    def kept(self) -> Tensor:
        """Which places of the padded [sequences x longest] are no padding: [own tokens] int64."""
        longest = max(self.lengths)
        return torch.cat([torch.arange(length) + row * longest for row, length in enumerate(self.lengths)])


@dataclass(frozen=True)
class Packing:
    """The row's layout. `order` lists the sequences, by their place in the batch, as they lie in the row."""

    groups: tuple[Group, ...]
    order: tuple[int, ...]
    tokens: int
    token_ids: Tensor  # [1, tokens], int64
    position_ids: Tensor  # [1, tokens], int64
    targets: Tensor  # [target tokens], int64: the places in the row that predict them, sequence by sequence of `order`
    target_ids: Tensor  # [target tokens], int64
    target_counts: Tensor  # [sequences], int64, in `order`

    def to(self, device: torch.device | str | int) -> "Packing":
        """The same layout with its tensors on `device`. The hooks of a device map call it too."""
        device = torch.device(device)
        if device == self.token_ids.device:
            return self
        moved = {name: to_device(getattr(self, name), device) for name in _TENSORS}
        groups = tuple(_moved_group(group, device) for group in self.groups)
        return Packing(groups=groups, order=self.order, tokens=self.tokens, **moved)


_TENSORS = ("token_ids", "position_ids", "targets", "target_ids", "target_counts")


def _moved_group(group: Group, device: torch.device) -> Group:
    moved = Group(group.template_tokens, group.lengths)
    moved.__dict__.update(own=to_device(group.own, device), kept=to_device(group.kept, device))
    return moved


def pack(sequences: Sequence[TokenSequence]) -> Packing:
    """Lay out a batch; sequences with the same template lie together."""
    by_template: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        by_template.setdefault(sequence.template, []).append(index)
    groups: list[Group] = []
    token_ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for template, members in by_template.items():
        groups.append(Group(len(template), tuple(len(sequences[index].own) for index in members)))
        token_ids += template
        positions += range(len(template))
        for index in members:
            sequence = sequences[index]
            # The token before a target token predicts it; `template` never reaches that far.
            first = len(token_ids) + sequence.prompt_tokens - len(template) - 1
            targets += range(first, first + sequence.target_tokens)
            token_ids += sequence.own
            positions += range(len(template), len(sequence.token_ids))
    padding = -len(token_ids) % _ROW_MULTIPLE
    order = tuple(index for members in by_template.values() for index in members)
    return Packing(
        groups=tuple(groups),
        order=order,
        tokens=len(token_ids) + padding,
        token_ids=torch.tensor([token_ids + [0] * padding]),
        position_ids=torch.tensor([positions + [0] * padding]),
        targets=torch.tensor(targets),
        target_ids=torch.tensor([token for index in order for token in sequences[index].target]),
        target_counts=torch.tensor([sequences[index].target_tokens for index in order]),
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host's without waiting for what the device is doing."""
    # Only from pinned memory does a copy to CUDA not wait; a device map also moves what is on a GPU already.
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
