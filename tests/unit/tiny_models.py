"""Random models of a few thousand weights and a tokenizer of single bytes: real families, nothing to download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3NextConfig,
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
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {}),
    "gemma": (GemmaConfig, {}),
    "gemma2": (Gemma2Config, {"sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 5, "query_pre_attn_scalar": 8}),
    "mistral": (MistralConfig, {"sliding_window": 5}),
    "phi": (PhiConfig, {}),
    "phi3": (Phi3Config, {}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
    ),
    # Its values have another size than its queries.
    "deepseek_v3": (
        DeepseekV3Config,
        {
            "first_k_dense_replace": 99,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
}
FAMILIES = tuple(CONFIGS)
# Every other layer is no attention.
MIXING: dict[str, tuple[type[PreTrainedConfig], dict[str, object]]] = {
    "lfm2": (Lfm2Config, {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    "qwen3_next": (
        Qwen3NextConfig,
        {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "mlp_only_layers": [0, 1, 2, 3],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
}
DOWN_PROJECTIONS = {"phi": "mlp.fc2", "qwen2_moe": "mlp.shared_expert.down_proj", "lfm2": "feed_forward.w2"}
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


def down_projection(family: str, layer: int) -> str:
    return f"model.layers.{layer}.{DOWN_PROJECTIONS.get(family, 'mlp.down_proj')}"


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random fp32 model, its initial weights large enough that different inputs give clearly different outputs."""
    config_class, settings = (CONFIGS | MIXING)[family]
    torch.manual_seed(seed)
    config = config_class(**{**SIZES, "initializer_range": 0.2, **settings, **overrides})
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_base(
    family: str = "llama",
    location: str | None = None,
    *,
    chat: bool = True,
    dtype: torch.dtype = torch.float32,
    **overrides: object,
) -> BaseModel:
    """A frozen random model, tuned at `location` or else at the down-projection of the third of its four layers."""
    model = tiny_model(family, **overrides)
    nn.Module.to(model, dtype)
    return freeze_base(
        model,
        tiny_tokenizer(chat=chat),
        location=down_projection(family, 2) if location is None else location,
        path=Path(f"tiny-{family}"),
        name=f"tiny-{family}",
        fingerprint=f"tiny-{family}-{sorted(overrides.items())}",
    )


def snapshot(base: BaseModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def unchanged(base: BaseModel, before: dict[str, torch.Tensor]) -> bool:
    after = base.model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
