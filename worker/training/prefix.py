"""What the frozen layers below the tuned location make of a token sequence.

It never changes, in any epoch of any run, so it is computed once per sequence and kept. The cache belongs to the
process; runs and evaluations share it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from worker.model import BaseModel
from worker.training.encode import TokenSequence
from worker.training.resume import ResumeBatch, hidden_below

DEFAULT_CAPACITY_BYTES = 1 << 30


class _Key(NamedTuple):
    fingerprint: str
    layer_index: int
    token_ids: tuple[int, ...]


class PrefixCache:
    """Hidden states at the input of the tuned layer, least recently used out first.

    A value does not depend on what it was computed together with, so a run is the same to the last bit whether its
    sequences were cached or not.
    """

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY_BYTES) -> None:
        self._capacity_bytes = capacity_bytes
        self._states: OrderedDict[_Key, Tensor] = OrderedDict()
        self._size_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Bytes held now; at most the capacity."""
        return self._size_bytes

    def __len__(self) -> int:
        return len(self._states)

    def hidden(self, base: BaseModel, token_ids: tuple[int, ...]) -> Tensor:
        """The input of the tuned layer: [tokens, hidden size], in the model's dtype, on its device."""
        key = _Key(base.fingerprint, base.layer_index, token_ids)
        if key in self._states:
            self._states.move_to_end(key)
            return self._states[key]
        computed = hidden_below(base, token_ids)
        self._states[key] = computed
        self._size_bytes += computed.nbytes
        self._evict()
        return computed

    def _evict(self) -> None:
        while self._size_bytes > self._capacity_bytes:
            _, oldest = self._states.popitem(last=False)
            self._size_bytes -= oldest.nbytes


def resume_batch(base: BaseModel, prefix: PrefixCache, sequences: Sequence[TokenSequence]) -> ResumeBatch:
    """Collate sequences for `logits_above`, padded on the right with zeros.

    The positions are those that predict the learned tokens: the one before each, sequence by sequence. They come from
    lengths, never from comparing ids with the pad id.
    """
    longest = max(len(sequence.token_ids) for sequence in sequences)
    hidden = torch.nn.utils.rnn.pad_sequence(
        [prefix.hidden(base, sequence.token_ids) for sequence in sequences], batch_first=True
    )
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence.token_ids)] = torch.tensor(sequence.token_ids)
    return ResumeBatch(
        input_ids=input_ids.to(base.device),
        hidden=hidden,
        rows=sequence_index(sequences).to(base.device),
        columns=torch.tensor(
            [
                position - 1
                for sequence in sequences
                for position in range(sequence.prompt_tokens, len(sequence.token_ids))
            ]
        ).to(base.device),
    )


def sequence_index(sequences: Sequence[TokenSequence]) -> Tensor:
    """For every learned token, the number of its sequence: [learned tokens], int64."""
    counts = torch.tensor([sequence.target_tokens for sequence in sequences])
    return torch.repeat_interleave(torch.arange(len(sequences)), counts)


def learned_ids(sequences: Sequence[TokenSequence]) -> Tensor:
    """The ids of the learned tokens, sequence by sequence: [learned tokens], int64."""
    return torch.tensor([token for sequence in sequences for token in sequence.token_ids[sequence.prompt_tokens :]])
