import math

import pytest
import torch

from worker.training.objective import batch_loss


def test_the_mean_is_over_each_sequence_first_so_a_long_target_weighs_no_more() -> None:
    # Over two classes: a probability of 1/2 costs ln 2, of 1/4 costs ln 4.
    certain_half, quarter = [0.0, 0.0], [math.log(1.0), math.log(3.0)]
    logits = torch.tensor([certain_half, certain_half, certain_half, quarter])
    loss = batch_loss(logits, torch.zeros(4, dtype=torch.long), torch.tensor([3, 1]))
    assert loss.per_sequence.tolist() == pytest.approx([math.log(2), math.log(4)])
    assert loss.total.item() == pytest.approx(math.log(2) + math.log(4))
    assert loss.worst_token.tolist() == pytest.approx([math.log(2), math.log(4)])


def test_the_worst_token_is_each_sequences_own() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)], [0.0, 0.0]])
    loss = batch_loss(logits, torch.zeros(3, dtype=torch.long), torch.tensor([2, 1]))
    assert loss.worst_token.tolist() == pytest.approx([math.log(4), math.log(2)])
    assert loss.per_sequence[0].item() == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_the_loss_is_computed_in_fp32_whatever_the_logits_are() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ids = torch.tensor([1, 2, 3])
    loss = batch_loss(logits, ids, torch.tensor([2, 1]))
    assert loss.total.dtype == torch.float32
    expected = -torch.log_softmax(logits.double(), dim=-1)[torch.arange(3), ids]
    torch.testing.assert_close(loss.worst_token.double(), torch.stack([expected[:2].max(), expected[2]]))


def test_the_gradient_flows_through_the_total_only() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    loss = batch_loss(logits, torch.tensor([0, 1]), torch.tensor([1, 1]))
    assert loss.total.requires_grad
    assert not loss.per_sequence.requires_grad
    assert not loss.worst_token.requires_grad
