"""Teacher-forced scores of token sequences: what capability measures and the check of learned edits are made of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from worker.model import BaseModel
from worker.training.encode import TokenSequence
from worker.training.packing import pack
from worker.training.partial_forward import logits_above
from worker.training.prefix import PrefixCache

# Bounds the fp32 logits (512 positions are 100 MB with a vocabulary of 49,152) and the row.
_BATCH_TARGETS = 512
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class TokenScores:
    """The scores of one sequence's target tokens, on the CPU.

    `nats` is [target tokens] fp32: the negative log-likelihood of each. `greedy` is [target tokens] bool: whether the
    token is the most likely one there.
    """

    nats: Tensor
    greedy: Tensor


@torch.no_grad()
def score(
    base: BaseModel, tensors: Mapping[str, Tensor], prefix: PrefixCache, sequences: Sequence[TokenSequence]
) -> list[TokenScores]:
    """Score each sequence with `tensors` (by parameter name) in place of the base's own.

    Sequences are batched by like length; the order of the result is that of `sequences`.
    """
    on_device = {name: tensor.to(base.device, base.model.dtype) for name, tensor in tensors.items()}
    scores: dict[int, TokenScores] = {}
    for indices in _batches(sequences):
        batch = [sequences[index] for index in indices]
        packing = pack(batch).to(base.device)
        logits = logits_above(base, on_device, packing, prefix.row(base, packing, batch)).float()
        nats = functional.cross_entropy(logits, packing.target_ids, reduction="none").cpu()
        greedy = (logits.argmax(dim=-1) == packing.target_ids).cpu()
        counts = packing.target_counts.tolist()
        split = zip(torch.split(nats, counts), torch.split(greedy, counts), strict=True)
        in_order = (indices[place] for place in packing.order)
        scores.update(zip(in_order, (TokenScores(*pair) for pair in split), strict=True))
    return [scores[index] for index in range(len(sequences))]


def _batches(sequences: Sequence[TokenSequence]) -> Iterator[list[int]]:
    """Indices of sequences of like length, in batches within the bounds; a batch has at least one."""
    batch: list[int] = []
    targets = tokens = 0
    for index in sorted(range(len(sequences)), key=lambda index: len(sequences[index].token_ids)):
        targets += sequences[index].target_tokens
        tokens += len(sequences[index].own)
        if batch and (targets > _BATCH_TARGETS or tokens > _BATCH_TOKENS):
            yield batch
            batch, targets, tokens = [], sequences[index].target_tokens, len(sequences[index].own)
        batch.append(index)
    if batch:
        yield batch
