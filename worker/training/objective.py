"""The loss that a run minimises.

Cross entropy in fp32 over the target's tokens, EOS included: the mean over the tokens of each sequence, then the mean
over sequences, so that a long target weighs no more than a short one (arXiv 2509.22072, section 3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class BatchLoss:
    """The losses of one batch, fp32, in nats. `per_sequence` is [sequences], the others are scalars."""

    mean: Tensor
    per_sequence: Tensor
    worst_token: Tensor


def batch_loss(logits: Tensor, token_ids: Tensor, rows: Tensor) -> BatchLoss:
    """Losses of the learned tokens of a batch.

    Args:
        logits: [learned tokens, vocabulary], any float dtype.
        token_ids: [learned tokens], int64, what each position must predict.
        rows: [learned tokens], int64, ascending from 0 without gaps: the sequence that each belongs to.
    """
    token_losses = functional.cross_entropy(logits.float(), token_ids, reduction="none")
    counts = torch.bincount(rows)
    totals = token_losses.new_zeros(len(counts)).index_add(0, rows, token_losses)
    per_sequence = totals / counts
    return BatchLoss(per_sequence.mean(), per_sequence.detach(), token_losses.detach().max())
