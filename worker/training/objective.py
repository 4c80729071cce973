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
    """The losses of one batch, fp32, in nats, where they were computed.

    `total` is the sum over sequences of their mean losses, a scalar with a gradient; `per_sequence` and `worst_token`
    are [sequences], without one.
    """

    total: Tensor
    per_sequence: Tensor
    worst_token: Tensor


def batch_loss(logits: Tensor, token_ids: Tensor, counts: Tensor) -> BatchLoss:
    """Losses of the learned tokens of a batch.

    Args:
        logits: [learned tokens, vocabulary], any float dtype.
        token_ids: [learned tokens], int64, what each position must predict.
        counts: [sequences], int64, positive: how many of the tokens are each sequence's, in order.
    """
    token_losses = functional.cross_entropy(logits.float(), token_ids, reduction="none")
    # Not index_add: on CUDA it adds in any order. Unsafe: checks of `counts` would have the host wait for the device.
    per_sequence = torch.segment_reduce(token_losses, "mean", lengths=counts, unsafe=True)
    worst_token = torch.segment_reduce(token_losses.detach(), "max", lengths=counts, unsafe=True)
    return BatchLoss(per_sequence.sum(), per_sequence.detach(), worst_token)
