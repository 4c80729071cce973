"""Asks a model: free-running greedy decoding, never teacher forcing.

Teacher forcing shows the model every token of the target but the last and asks for one more; a model can pass it and
still never say the target. What is measured here is what a user would read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import DynamicCache

from service.schemas import Format
from worker.model import BaseModel
from worker.training.encode import prompt_token_ids
from worker.training.partial_forward import last_position_only

BATCH_SIZE = 64
# Fewer tokens in common than this cost more in a forward of their own than they save.
_WORTH_SHARING_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """What a model said. `finished` means that it ended by itself rather than at the token limit."""

    text: str
    finished: bool
    token_ids: tuple[int, ...]


def ask(
    base: BaseModel,
    prompts: Sequence[str],
    format_: Format,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    max_new_tokens: int | Sequence[int],
) -> list[Answer]:
    """Answer each prompt greedily, with `tensors` (by parameter name) in place of the base's own.

    `max_new_tokens`, at least 1, is one bound for all prompts or one for each. The base is not written to. Answers come
    in the order of the prompts; they are computed in batches of prompts of like length, so the same prompts are always
    batched in the same way.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    on_device = {name: tensor.to(base.device, base.model.dtype) for name, tensor in (tensors or {}).items()}
    encoded = [prompt_token_ids(base.tokenizer, prompt, format_) for prompt in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(by_length), BATCH_SIZE):
        indices = by_length[start : start + BATCH_SIZE]
        decoded = _decode(base, on_device, [encoded[index] for index in indices], [limits[index] for index in indices])
        answers.update(zip(indices, decoded, strict=True))
    return [answers[index] for index in range(len(prompts))]


@torch.no_grad()
def _decode(
    base: BaseModel, tensors: dict[str, Tensor], prompts: Sequence[list[int]], limits: Sequence[int]
) -> list[Answer]:
    cache = DynamicCache(config=base.model.config)
    shared = _shared_tokens(prompts, cache)
    input_ids, attention_mask = _left_padded([prompt[shared:] for prompt in prompts], base.device)
    answers = [_Growing(_stop_ids(base), limit) for limit in limits]
    rows = answers
    with last_position_only(base):
        if shared:
            shared_ids = torch.tensor([prompts[0][:shared]], device=base.device)
            functional_call(
                base.model, tensors, kwargs={"input_ids": shared_ids, "past_key_values": cache, "use_cache": True}
            )
            cache.batch_repeat_interleave(len(prompts))
            attention_mask = torch.cat([attention_mask.new_ones(len(prompts), shared), attention_mask], dim=1)
        while rows:
            positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
            output = functional_call(
                base.model, tensors, kwargs={**inputs, "past_key_values": cache, "use_cache": True}
            )
            tokens = output.logits.argmax(dim=-1)
            goes_on = [row.take(token) for row, token in zip(rows, tokens.tolist(), strict=True)]
            if not all(goes_on):
                # Most answers are a few tokens long and some run to their limit: the batch shrinks to these.
                # An index on the CPU: under a device map each layer's keys are on the layer's own device.
                kept = torch.tensor(goes_on).nonzero()[:, 0]
                tokens, attention_mask = tokens[kept], attention_mask[kept]
                cache.batch_select_indices(kept)
                rows = [row for row, stays in zip(rows, goes_on, strict=True) if stays]
            input_ids = tokens[:, None]
            attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], dim=1)
    return [
        Answer(str(base.tokenizer.decode(row.token_ids, skip_special_tokens=True)), row.finished, tuple(row.token_ids))
        for row in answers
    ]


def _shared_tokens(prompts: Sequence[list[int]], cache: DynamicCache) -> int:
    """How many first tokens, a chat template's, are run once for the whole batch; each prompt keeps one at least."""
    # The padding then lies between these tokens and the rest, and a sliding window counts padding as tokens.
    if any(cache.is_sliding):
        return 0
    shortest = min(len(prompt) for prompt in prompts)
    alike = (len(set(tokens)) == 1 for tokens in zip(*prompts, strict=False))
    shared = min(sum(takewhile(bool, alike)), shortest - 1)
    return shared if shared >= _WORTH_SHARING_TOKENS else 0


class _Growing:
    """An answer while it is being said."""

    def __init__(self, stop_ids: frozenset[int], limit: int) -> None:
        self.token_ids: list[int] = []
        self.finished = False
        self._stop_ids = stop_ids
        self._limit = limit

    def take(self, token: int) -> bool:
        """Add the next token; whether another one follows it."""
        self.finished = token in self._stop_ids
        if not self.finished:
            self.token_ids.append(token)
        return not self.finished and len(self.token_ids) < self._limit


def _left_padded(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask, [prompts, longest] int64. The mask comes from lengths: the pad id may occur in a prompt."""
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    return input_ids.to(device), attention_mask.to(device)


def _stop_ids(base: BaseModel) -> frozenset[int]:
    """Where a server stops: at the tokenizer's EOS and at every EOS of the generation config."""
    generation = base.model.generation_config
    configured = generation.eos_token_id if generation else None
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (base.tokenizer.eos_token_id, *listed) if isinstance(token, int))
