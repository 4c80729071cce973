"""Whether it matters to a model what lies beside a sequence in a packed row.

Attention is told where sequences begin and end (worker.training.attention). A convolution or a recurrence over tokens,
which some families have beside it, is not, and mixes what lies side by side. Nothing that is common to all families
tells such layers from others, so a few tokens are tried.
"""

import torch
from torch import Tensor

from worker.model import BaseModel
from worker.training.encode import TokenSequence
from worker.training.packing import pack
from worker.training.partial_forward import UnsupportedLayerError, hidden_below, logits_above

# Ordinary words, more tokens than are needed in every tokenizer.
_TEXT = (
    "The harbour was quiet in the morning, and only two boats came back before noon with anything worth selling. "
    "Nobody on the pier asked where the third one was, because everyone had seen it leave late."
)
_TEMPLATE_TOKENS = 6
# The first is the prompt's. The two others are predicted right behind the seam, where the shortest convolution leaks.
_OWN_TOKENS = 3
_SEQUENCES = 4
# Far above rounding, which in rows of one shape next to never differs, and far below what a leak does (record 0050).
_TOLERANCE = 0.1


def check_rows(base: BaseModel) -> None:
    """Find out on a few tokens whether packed rows are right for a model. Costs two forwards of it.

    Raises:
        UnsupportedLayerError: a sequence comes to something else behind others than at the beginning of a row.
        UnsupportedAttentionError: the model's attention cannot be packed.
    """
    difference = row_difference(base)
    # A model that computes no numbers at all is found out by its loss.
    if difference > _TOLERANCE:
        raise UnsupportedLayerError(
            f"{type(base.model).__name__} cannot be trained: what it computes over a sequence depends on what lies "
            f"before it in a packed row (the logits differ by {difference:.2g} of their size), as in layers with a "
            "convolution or a recurrence over tokens"
        )


@torch.no_grad()
def row_difference(base: BaseModel) -> float:
    """By how much a row's logits differ when its sequences lie the other way round, as a share of their size.

    What is first in a row lies as it would alone. The rows have one shape, and one set of tokens for each expert.
    """
    ids = base.tokenizer(_TEXT, add_special_tokens=False).input_ids
    template, rest = ids[:_TEMPLATE_TOKENS], ids[_TEMPLATE_TOKENS:]
    sequences = [
        TokenSequence((*template, *rest[begin : begin + _OWN_TOKENS]), len(template) + 1, len(template))
        for begin in range(0, _SEQUENCES * _OWN_TOKENS, _OWN_TOKENS)
    ]
    logits, turned = _logits(base, sequences), _logits(base, sequences[::-1]).flip(0)
    # What is the same for every token is no difference between tokens.
    size = (logits - logits.mean(dim=-1, keepdim=True)).norm()
    return float((logits - turned).norm() / size)


def _logits(base: BaseModel, sequences: list[TokenSequence]) -> Tensor:
    """[sequences, target tokens of each, vocabulary] fp32, computed in one row."""
    packing = pack(sequences).to(base.device)
    logits = logits_above(base, {}, packing, hidden_below(base, packing)).float()
    return logits.view(len(sequences), -1, logits.shape[-1])
