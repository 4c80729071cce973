"""The cut-down forward leaves no trace, and refuses what it cannot cut. Its values: test_training_packing.py."""

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, snapshot, tiny_base, tiny_tokenizer, unchanged
from torch import Tensor
from transformers import FalconConfig, FalconForCausalLM

from worker.model import BaseModel, freeze_base
from worker.training.encode import TokenSequence
from worker.training.packing import pack
from worker.training.partial_forward import (
    UnsupportedLayerError,
    hidden_below,
    last_position_only,
    logits_above,
    run_tuned_layer,
)
from worker.training.prefix import PrefixCache

SEQUENCES = (TokenSequence((5, 6, 7, 8, 9, 10, 256), prompt_tokens=4), TokenSequence((20, 21, 256), prompt_tokens=1))


def cut_down(base: BaseModel, weight: Tensor) -> Tensor:
    packing = pack(SEQUENCES)
    hidden = PrefixCache().row(base, packing, SEQUENCES)
    return logits_above(base, {base.parameter_names[0]: weight}, packing, hidden)


def test_the_base_and_its_forward_are_as_before() -> None:
    base = tiny_base()
    before, inputs = snapshot(base), torch.tensor([SEQUENCES[0].token_ids])
    logits = base.model(inputs).logits
    cut_down(base, torch.zeros(32, 48))
    packing = pack(SEQUENCES)
    run_tuned_layer(base, packing, hidden_below(base, packing))
    assert unchanged(base, before)
    assert torch.equal(base.model(inputs).logits, logits)


def test_a_failing_forward_leaves_no_hook_behind() -> None:
    base = tiny_base()
    inputs = torch.tensor([SEQUENCES[0].token_ids])
    logits = base.model(inputs).logits
    with pytest.raises(RuntimeError):
        cut_down(base, torch.zeros(3, 3))
    assert torch.equal(base.model(inputs).logits, logits)
    assert not any("forward" in layer.__dict__ for layer in base.layers)


def test_a_forward_that_was_set_on_a_layer_survives() -> None:
    base = tiny_base()
    own = base.layers[0].forward
    base.layers[0].__dict__["forward"] = own
    cut_down(base, base.tuned_tensors()[base.parameter_names[0]])
    assert base.layers[0].__dict__["forward"] is own


def test_the_hidden_states_are_what_the_model_itself_hands_to_the_layer() -> None:
    base = tiny_base()
    ids = SEQUENCES[0].token_ids
    states = base.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    found = hidden_below(base, pack(SEQUENCES[:1]))
    torch.testing.assert_close(found[: len(ids)], states[base.layer_index][0], rtol=1e-4, atol=1e-5)


def test_layers_run_that_are_needed_and_no_others() -> None:
    base = tiny_base()
    ran: list[int] = []
    for index, layer in enumerate(base.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: ran.append(index))
    packing = pack(SEQUENCES)
    hidden = hidden_below(base, packing)
    assert ran == [0, 1]
    ran.clear()
    run_tuned_layer(base, packing, hidden)
    assert ran == [2]
    ran.clear()
    logits_above(base, {}, packing, hidden)
    assert ran == [2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_feed_forward_sees_only_what_predicts_a_target(family: str) -> None:
    base = tiny_base(family)
    packing = pack(SEQUENCES)
    hidden = hidden_below(base, packing)
    seen: dict[int, int] = {}
    for index, layer in enumerate(base.layers):
        layer.mlp.register_forward_hook(lambda _, args, __, index=index: seen.update({index: args[0].shape[-2]}))
    narrowed = logits_above(base, {}, packing, hidden)
    assert seen == {2: packing.tokens, 3: len(packing.targets)}
    whole = base.model(torch.tensor([SEQUENCES[0].token_ids])).logits[0, 3:6]
    torch.testing.assert_close(narrowed[:3], whole, rtol=1e-4, atol=1e-5)


def test_a_feed_forward_that_attention_reads_sees_all_tokens() -> None:
    base = tiny_base()
    layer = base.layers[-1]

    def other_way_round(hidden_states: Tensor, **kwargs: object) -> Tensor:
        between = hidden_states + layer.mlp(layer.post_attention_layernorm(hidden_states))
        return between + layer.self_attn(hidden_states=layer.input_layernorm(between), **kwargs)[0]

    layer.__dict__["forward"] = other_way_round
    found = cut_down(base, base.tuned_tensors()[base.parameter_names[0]])
    whole = base.model(torch.tensor([SEQUENCES[0].token_ids])).logits[0, 3:6]
    torch.testing.assert_close(found[:3], whole, rtol=1e-4, atol=1e-5)


def test_logits_can_be_had_for_the_last_position_only() -> None:
    base = tiny_base()
    inputs = torch.tensor([SEQUENCES[0].token_ids])
    with last_position_only(base):
        last = base.model(inputs).logits
    torch.testing.assert_close(last, base.model(inputs).logits[:, -1])


def test_a_family_whose_layers_return_tuples_is_refused() -> None:
    config = FalconConfig(vocab_size=260, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    base = freeze_base(
        FalconForCausalLM(config).eval(),
        tiny_tokenizer(),
        location="transformer.h.1.mlp.dense_4h_to_h",
        path=Path("falcon"),
        name="falcon",
        fingerprint="falcon",
    )
    with pytest.raises(UnsupportedLayerError, match=r"transformer\.h\.1"):
        cut_down(base, base.tuned_tensors()[base.parameter_names[0]])
