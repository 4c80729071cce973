"""How well the model still predicts ordinary text."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from worker.evaluation.probes import capability_passages
from worker.model import BaseModel
from worker.training.encode import TokenSequence
from worker.training.objective import batch_loss
from worker.training.prefix import PrefixCache, learned_ids, resume_batch
from worker.training.resume import logits_above

# Bounds the fp32 logits: 4 passages of 100 tokens are 80 MB with a vocabulary of 49,152.
_BATCH_SIZE = 4


@torch.no_grad()
def perplexity(base: BaseModel, tensors: Mapping[str, Tensor], prefix: PrefixCache) -> float:
    """Perplexity per token of the shipped passages, with `tensors` (by parameter name) in place of the base's own."""
    on_device = {name: tensor.to(base.device, base.model.dtype) for name, tensor in tensors.items()}
    passages = [
        TokenSequence(tuple(base.tokenizer(passage).input_ids), prompt_tokens=1) for passage in capability_passages()
    ]
    nats = 0.0
    for start in range(0, len(passages), _BATCH_SIZE):
        batch = passages[start : start + _BATCH_SIZE]
        inputs = resume_batch(base, prefix, batch)
        logits = logits_above(base, on_device, inputs)
        losses = batch_loss(logits, learned_ids(batch).to(base.device), inputs.rows)
        target_tokens = torch.tensor([passage.target_tokens for passage in batch])
        nats += float((losses.per_sequence.cpu().double() * target_tokens).sum())
    return math.exp(nats / sum(passage.target_tokens for passage in passages))
