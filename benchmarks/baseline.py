"""The paper's procedure, plainly (LocFT-BF, arXiv 2509.22072): what Errata's trainer is compared with.

The whole model runs in fp32 over padded batches, with logits at every position; Adam changes one matrix.
"""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from worker.training.encode import TokenSequence

_NOT_LEARNED = -100


class PlainTrainer:
    """Trains one parameter of a model in place; every other one is frozen.

    Args:
        base_fp32: the model, in fp32; the parameter holds the result.
        parameter_name: the one matrix that is trained.
        lr: Adam's step size.
        loss_threshold: a batch whose mean loss, in nats, is under it takes no step.
    """

    def __init__(self, base_fp32: PreTrainedModel, parameter_name: str, lr: float, loss_threshold: float) -> None:
        self._model = base_fp32.eval().requires_grad_(requires_grad=False)
        self._parameter = self._model.get_parameter(parameter_name).requires_grad_()
        if self._parameter.dtype != torch.float32:
            raise ValueError(f"{parameter_name} is {self._parameter.dtype}, training is in fp32")
        self._optimiser = torch.optim.Adam([self._parameter], lr=lr)
        self._loss_threshold = loss_threshold

    def epoch(self, batches: Sequence[Sequence[TokenSequence]]) -> float:
        """Train on the batches in their order; the mean of the batches' losses (nats), each before its own step."""
        return statistics.fmean(self._train(batch) for batch in batches)

    def _train(self, batch: Sequence[TokenSequence]) -> float:
        loss = self._loss(batch)
        if loss.item() >= self._loss_threshold:
            self._optimiser.zero_grad()
            loss.backward()
            self._optimiser.step()
        return loss.item()

    def _loss(self, batch: Sequence[TokenSequence]) -> Tensor:
        """The mean over sequences of each one's mean over its target's tokens, EOS included: a scalar, fp32."""
        token_ids, mask, labels = (part.to(self._model.device) for part in _padded(batch))
        logits = self._model(input_ids=token_ids, attention_mask=mask, use_cache=False).logits
        wanted = labels[:, 1:]
        token_losses = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=_NOT_LEARNED, reduction="none"
        ).view_as(wanted)
        return (token_losses.sum(dim=1) / (wanted != _NOT_LEARNED).sum(dim=1)).mean()


def _padded(batch: Sequence[TokenSequence]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels, each [sequences, longest] int64, padded on the right."""
    ids = [torch.tensor(sequence.token_ids) for sequence in batch]
    labels = [row.clone() for row in ids]
    for row, sequence in zip(labels, batch, strict=True):
        row[: sequence.prompt_tokens] = _NOT_LEARNED
    masks = [torch.ones_like(row) for row in ids]
    token_ids, mask = (pad_sequence(rows, batch_first=True) for rows in (ids, masks))
    return token_ids, mask, pad_sequence(labels, batch_first=True, padding_value=_NOT_LEARNED)
