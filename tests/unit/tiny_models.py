"""Random models of a few thousand weights and a tokenizer of single bytes: real families, nothing to download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from worker.model import BaseModel, freeze_base

# These models are too small to share out: several threads would mostly wait for each other.
torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
}
LOCATION = "model.layers.2.mlp.down_proj"
# A tuned matrix with room enough to learn a few edits to the end.
ROOMY = {"hidden_size": 64, "intermediate_size": 256}


def tiny_tokenizer(*, chat: bool = True, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """One token a byte (256 is EOS and, as in SmolLM2, also the pad token), plus the merges asked for."""
    merged = [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate([*BYTES, "<eos>", "<bos>", *merged])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random fp32 model, its initial weights large enough that different inputs give clearly different outputs."""
    config_class, model_class, settings = FAMILIES[family]
    torch.manual_seed(seed)
    return model_class(config_class(**{**SIZES, "initializer_range": 0.2, **settings, **overrides})).eval()


def tiny_base(family: str = "llama", *, chat: bool = True, location: str = LOCATION, **overrides: object) -> BaseModel:
    return freeze_base(
        tiny_model(family, **overrides),
        tiny_tokenizer(chat=chat),
        location=location,
        path=Path(f"tiny-{family}"),
        name=f"tiny-{family}",
        fingerprint=f"tiny-{family}-{sorted(overrides.items())}",
    )


def snapshot(base: BaseModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def unchanged(base: BaseModel, before: dict[str, torch.Tensor]) -> bool:
    after = base.model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
