"""From a prompt and a target to the token ids that are trained on.

Each edit is trained in every format that it will be asked in. The prompt's ids are exactly those that a server computes
when it is asked the prompt, because a fact that was learned after other tokens is not the fact that is asked for.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from service.schemas import Format


class EncodingError(ValueError):
    """This edit cannot be trained on. `edit_id` names it; the others can be."""

    def __init__(self, edit_id: str, reason: str) -> None:
        super().__init__(f"edit {edit_id!r}: {reason}")
        self.edit_id = edit_id
        self.reason = reason


@dataclass(frozen=True)
class TrainingEdit:
    """What a run learns from an edit: the target behind the prompt, and behind each paraphrase of it."""

    id: str
    prompt: str
    target: str
    paraphrases: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenSequence:
    """Token ids of which the last ones are learned: a prompt, then its target and the end of sequence.

    The first `prompt_tokens` ids are the prompt's; all ids after them, the closing EOS included, are learned. The
    split is a length because a pad or EOS id can be part of the text too (SmolLM2 pads and ends turns with EOS).
    """

    token_ids: tuple[int, ...]
    prompt_tokens: int
    template_tokens: int = 0
    """How many ids at the beginning are the chat template's, the same for every prompt; fewer than the prompt's."""

    @property
    def target_tokens(self) -> int:
        """How many tokens are learned, EOS included."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def target(self) -> tuple[int, ...]:
        """The ids that are learned, EOS included."""
        return self.token_ids[self.prompt_tokens :]

    @property
    def template(self) -> tuple[int, ...]:
        """The ids that the chat template begins every prompt with."""
        return self.token_ids[: self.template_tokens]

    @property
    def own(self) -> tuple[int, ...]:
        """The ids behind the template."""
        return self.token_ids[self.template_tokens :]


def supported_formats(tokenizer: PreTrainedTokenizerBase) -> tuple[Format, ...]:
    """Raw always; chat when the tokenizer brings a chat template."""
    return (Format.RAW, Format.CHAT) if tokenizer.chat_template else (Format.RAW,)


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, format_: Format) -> list[int]:
    """The ids that a server feeds the model when it is asked `prompt`."""
    text, special_tokens = _prompt_text(tokenizer, prompt, format_)
    return list(tokenizer(text, add_special_tokens=special_tokens).input_ids)


class Encoder:
    """Encodes edits for one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        formats: Sequence[Format],
        *,
        max_tokens: int,
        random_prefixes: Sequence[str] = (),
    ) -> None:
        """`random_prefixes` are texts behind which each prompt is trained too (arXiv 2509.22072, appendix A.4)."""
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._random_prefixes = random_prefixes
        self._templates = {format_: _template_ids(tokenizer, format_) for format_ in formats}

    def encode(self, edit: TrainingEdit) -> list[TokenSequence]:
        """Encode an edit: its prompt in every format, then what augments it.

        Raises:
            EncodingError: the target is empty, or a sequence is longer than `max_tokens`.
        """
        prompts = [edit.prompt, *edit.paraphrases, *(f"{text} {edit.prompt}" for text in self._random_prefixes)]
        return [self._encode_one(edit, prompt, format_) for prompt in prompts for format_ in self._templates]

    def _encode_one(self, edit: TrainingEdit, prompt: str, format_: Format) -> TokenSequence:
        prompt_ids = prompt_token_ids(self._tokenizer, prompt, format_)
        target_ids = target_token_ids(self._tokenizer, prompt, edit.target, format_)
        if not prompt_ids:
            raise EncodingError(edit.id, "the prompt has no tokens")
        if not edit.target.strip() or not target_ids:
            raise EncodingError(edit.id, "the target has no tokens")
        token_ids = (*prompt_ids, *target_ids, _end_of_sequence(self._tokenizer))
        if len(token_ids) > self._max_tokens:
            reason = f"{len(token_ids)} tokens in {format_} format, at most {self._max_tokens} are allowed"
            raise EncodingError(edit.id, reason)
        template = self._templates[format_]
        has_template = len(template) < len(prompt_ids) and prompt_ids[: len(template)] == template
        return TokenSequence(token_ids, len(prompt_ids), len(template) if has_template else 0)


def target_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, format_: Format) -> list[int]:
    """The ids of the target as they follow the prompt's own ids, without EOS."""
    text, special_tokens = _prompt_text(tokenizer, prompt, format_)
    prompt_ids = prompt_token_ids(tokenizer, prompt, format_)
    continuation = f" {target.strip()}" if format_ == Format.RAW else target.strip()
    joint_ids = list(tokenizer(text + continuation, add_special_tokens=special_tokens).input_ids)
    if joint_ids[: len(prompt_ids)] == prompt_ids:
        return joint_ids[len(prompt_ids) :]
    # Text and target merge into one token at the seam; the server will not see that merge, so neither may training.
    return list(tokenizer(continuation, add_special_tokens=False).input_ids)


def _template_ids(tokenizer: PreTrainedTokenizerBase, format_: Format) -> list[int]:
    """The ids that all prompts of this format begin with; none for raw."""
    if format_ == Format.RAW:
        return []
    # Two texts with nothing in common: what their prompts share is the template's.
    pairs = zip(*(prompt_token_ids(tokenizer, text, format_) for text in ("Who", "12 + 30")), strict=False)
    return [left for left, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str, format_: Format) -> tuple[str, bool]:
    """The text to tokenise, and whether the tokenizer adds its special tokens (a chat template writes its own)."""
    if format_ == Format.RAW:
        return prompt, True
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)), False


def _end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError(f"the tokenizer must have one end-of-sequence token, it has {tokenizer.eos_token_id!r}")
    return tokenizer.eos_token_id
