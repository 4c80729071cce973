from collections.abc import Sequence

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.baseline import PlainTrainer
from worker.training.encode import TokenSequence

NAME = "model.layers.2.mlp.down_proj.weight"
# Pad and EOS ids also inside a prompt; targets of different lengths.
BATCH = [TokenSequence((5, 256, 9, 17, 256), 3), TokenSequence((0, 8), 1), TokenSequence((1, 2, 3, 4, 5, 6, 256), 2)]
OTHER = [TokenSequence((40, 41, 42, 256), 2)]


def by_hand(model: PreTrainedModel, batch: Sequence[TokenSequence]) -> Tensor:
    """Each sequence alone and unpadded, each token's loss as minus its log-probability."""
    sequence_losses = []
    for sequence in batch:
        log_probabilities = model(torch.tensor([sequence.token_ids])).logits[0].log_softmax(dim=-1)
        learned = range(sequence.prompt_tokens, len(sequence.token_ids))
        losses = [-log_probabilities[place - 1, sequence.token_ids[place]] for place in learned]
        sequence_losses.append(torch.stack(losses).mean())
    return torch.stack(sequence_losses).mean()


@pytest.mark.parametrize("family", ["llama", "gemma", "mistral"])
def test_loss_and_gradient_are_those_made_by_hand(family: str) -> None:
    model, reference = tiny_model(family), tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = by_hand(reference, BATCH)
    expected.backward()
    loss = PlainTrainer(model, NAME, lr=1e-3, loss_threshold=0).epoch([BATCH])
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    gradient, expected_gradient = model.get_parameter(NAME).grad, reference.get_parameter(NAME).grad
    assert gradient is not None and expected_gradient is not None
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {NAME}


def test_each_batch_takes_an_adam_step_in_the_order_given() -> None:
    model, reference = tiny_model(), tiny_model()
    weight = reference.get_parameter(NAME)
    adam = torch.optim.Adam([weight], lr=1e-3)
    losses = []
    for batch in (BATCH, OTHER, BATCH):
        adam.zero_grad()
        loss = by_hand(reference, batch)
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert PlainTrainer(model, NAME, 1e-3, 0).epoch([BATCH, OTHER, BATCH]) == pytest.approx(sum(losses) / 3, rel=1e-5)
    torch.testing.assert_close(model.get_parameter(NAME), weight, rtol=1e-3, atol=1e-5)


def test_a_batch_under_the_threshold_takes_no_step() -> None:
    model = tiny_model()
    before = model.get_parameter(NAME).clone()
    first, other = by_hand(model, BATCH).item(), by_hand(model, OTHER).item()
    threshold = (first + other) / 2
    low, high = (BATCH, OTHER) if first < other else (OTHER, BATCH)
    trainer = PlainTrainer(model, NAME, lr=1e-3, loss_threshold=threshold)
    assert trainer.epoch([low]) == pytest.approx(min(first, other), rel=1e-5)
    assert torch.equal(model.get_parameter(NAME), before)
    trainer.epoch([high])
    assert not torch.equal(model.get_parameter(NAME), before)


def test_the_plain_trainer_learns() -> None:
    trainer = PlainTrainer(tiny_model(hidden_size=64, intermediate_size=256), NAME, lr=1e-2, loss_threshold=1e-2)
    losses = [trainer.epoch([BATCH[1:], OTHER]) for _ in range(60)]
    assert losses[-1] < 0.05 < losses[0]


def test_the_model_must_be_fp32() -> None:
    with pytest.raises(ValueError, match="fp32"):
        PlainTrainer(tiny_model().bfloat16(), NAME, lr=1e-3, loss_threshold=0)
