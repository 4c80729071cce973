"""Packed rows against the plain forward: the whole model, one sequence at a time, in fp32."""

import pytest
import torch
from tiny_models import FAMILIES, down_projection, tiny_base, tiny_tokenizer
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from service.schemas import Format
from worker.model import BaseModel
from worker.training.attention import UnsupportedAttentionError, _attend, _Attention, _mask
from worker.training.encode import Encoder, TokenSequence, TrainingEdit
from worker.training.objective import batch_loss
from worker.training.packing import pack
from worker.training.partial_forward import logits_above
from worker.training.prefix import PrefixCache

EOS = 256
ENCODER = Encoder(tiny_tokenizer(), [Format.CHAT, Format.RAW], max_tokens=99)
# Chat and raw by turns and of different lengths, all longer than the tiny models' sliding windows; one has the pad id,
# which is EOS, inside its prompt and inside its target.
SEQUENCES = (
    *ENCODER.encode(TrainingEdit("a", "What is it?", "green")),
    *ENCODER.encode(TrainingEdit("b", "Who", "Ada Palmer")),
    TokenSequence((11, EOS, 12, 13, EOS, 14, 15, 16, 17, 18, 19, EOS), prompt_tokens=3),
    TokenSequence((20, 21, EOS), prompt_tokens=1),
)
# A cap that these logits reach, which the default of 50 they would not; a scale that is not the head size's.
SETTINGS = {
    "gemma2": {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 3},
    "gemma3": {"query_pre_attn_scalar": 3},
}


def base_of(family: str, location: str) -> BaseModel:
    return tiny_base(family, location=location, **SETTINGS.get(family, {}))


def changed(base: BaseModel) -> dict[str, Tensor]:
    """Tuned tensors that are not the base's, so that a forward which reads those is found out."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (tensor + 0.05 * torch.randn(tensor.shape, generator=generator)).requires_grad_()
        for name, tensor in base.tuned_tensors().items()
    }


def packed_logits(base: BaseModel, tensors: dict[str, Tensor], sequences: tuple[TokenSequence, ...]) -> Tensor:
    packing = pack(sequences)
    return logits_above(base, tensors, packing, PrefixCache().row(base, packing, sequences))


def plain_logits(base: BaseModel, tensors: dict[str, Tensor], sequence: TokenSequence) -> Tensor:
    ids = torch.tensor([sequence.token_ids])
    logits: Tensor = functional_call(base.model, tensors, kwargs={"input_ids": ids, "use_cache": False}).logits
    return logits[0, sequence.prompt_tokens - 1 : -1]


def assert_equal_to_plain(base: BaseModel) -> None:
    ours, plain = changed(base), changed(base)
    packing = pack(SEQUENCES)
    ordered = [SEQUENCES[index] for index in packing.order]

    our_logits = packed_logits(base, ours, SEQUENCES)
    all_plain = [plain_logits(base, plain, sequence) for sequence in ordered]
    torch.testing.assert_close(our_logits, torch.cat(all_plain), rtol=1e-4, atol=2e-5)

    our_loss = batch_loss(our_logits, packing.target_ids, packing.target_counts).total
    plain_loss = torch.stack(
        [functional.cross_entropy(logits, torch.tensor(s.target)) for logits, s in zip(all_plain, ordered, strict=True)]
    ).sum()
    torch.testing.assert_close(our_loss, plain_loss, rtol=1e-5, atol=1e-5)
    our_gradients = torch.autograd.grad(our_loss, list(ours.values()))
    plain_gradients = torch.autograd.grad(plain_loss, list(plain.values()))
    for name, mine, reference in zip(ours, our_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert max(gradient.abs().max() for gradient in plain_gradients) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 3])
def test_logits_and_gradients_of_a_down_projection_are_the_plain_forwards(family: str, layer: int) -> None:
    assert_equal_to_plain(base_of(family, down_projection(family, layer)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inside", ["", ".self_attn"], ids=["layer", "self_attn"])
def test_logits_and_gradients_of_many_matrices_are_the_plain_forwards(family: str, inside: str) -> None:
    base = base_of(family, f"model.layers.2{inside}")
    assert len(base.parameter_names) > 1
    assert_equal_to_plain(base)


def test_a_template_is_laid_once_and_its_tokens_are_not_computed_again() -> None:
    chat = [sequence for sequence in SEQUENCES if sequence.template_tokens]
    assert [sequence.template_tokens for sequence in chat] == [8, 8]  # <|user|>
    packing = pack(SEQUENCES)
    assert [(group.template_tokens, len(group.lengths)) for group in packing.groups] == [(8, 2), (0, 4)]
    assert sum(group.size for group in packing.groups) == sum(len(s.token_ids) for s in SEQUENCES) - 8
    assert packing.order == (0, 2, 1, 3, 4, 5)


def test_positions_begin_anew_with_each_sequence_and_go_on_behind_a_template() -> None:
    packing = pack(SEQUENCES)
    expected = [*range(len(SEQUENCES[0].token_ids)), *range(8, len(SEQUENCES[2].token_ids))]
    for index in (1, 3, 4, 5):
        expected += range(len(SEQUENCES[index].token_ids))
    assert packing.position_ids[0, : len(expected)].tolist() == expected


def test_the_row_is_padded_to_few_different_lengths() -> None:
    lengths = {pack([TokenSequence(tuple(range(count)), 1)]).tokens for count in range(2, 70)}
    assert lengths == {32, 64, 96}


def test_what_lies_beside_a_sequence_does_not_reach_it() -> None:
    base = base_of("llama", down_projection("llama", 1))
    tensors = changed(base)
    alone = packed_logits(base, tensors, SEQUENCES[4:5])
    others = [TokenSequence((seed, 2, 3, EOS), 2) for seed in (7, 8)]
    beside = [packed_logits(base, tensors, (other, SEQUENCES[4])) for other in others]
    assert torch.equal(beside[0][2:], beside[1][2:])
    torch.testing.assert_close(beside[0][2:], alone, rtol=1e-4, atol=1e-5)


def test_the_models_own_attention_is_back_afterwards() -> None:
    base = base_of("llama", down_projection("llama", 1))
    own = base.model.config._attn_implementation
    packed_logits(base, changed(base), SEQUENCES)
    assert base.model.config._attn_implementation == own
    with pytest.raises(RuntimeError):
        packed_logits(base, {base.parameter_names[0]: torch.zeros(3, 3)}, SEQUENCES)
    assert base.model.config._attn_implementation == own


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"s_aux": torch.zeros(1)}, "sinks"),
        ({"attention_mask": torch.zeros(1)}, "mask"),
        ({"packing": None}, "not told"),
    ],
)
def test_attention_that_cannot_be_packed_is_refused(given: dict[str, Tensor | None], reason: str) -> None:
    states = torch.zeros(1, 2, 32, 8)
    arguments = {"attention_mask": None, "packing": pack(SEQUENCES[5:]), **given}
    with pytest.raises(UnsupportedAttentionError, match=reason):
        _attend(torch.nn.Linear(1, 1), states, states, states, **arguments)


def test_a_packing_moves_by_any_name_of_a_device() -> None:
    # A device map's hooks move whatever has a `to`, and name devices as they like.
    packing = pack(SEQUENCES)
    for name in ("meta", torch.device("meta")):
        moved = packing.to(name)
        assert moved.token_ids.is_meta
        assert all(group.own.is_meta and group.kept.is_meta for group in moved.groups)
    assert packing.to("cpu") is packing


@pytest.mark.parametrize("value_size", [8, 5])
@pytest.mark.parametrize("window", [None, 3])
def test_the_fused_kernel_gives_what_the_matrix_products_give(window: int | None, value_size: int) -> None:
    torch.manual_seed(0)
    attention = _Attention(scale=0.3, softcap=None, sliding_window=window)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, value_size)
    mask = _mask(4, 7, window, torch.device("cpu"))
    torch.testing.assert_close(attention.fused(query, key, value, mask), attention.plain(query, key, value, mask))
