import pytest
import torch
from tiny_models import tiny_base
from torch import Tensor

from worker.model import BaseModel
from worker.training.config import TrainingConfig
from worker.training.encode import Encoder, Format, TokenSequence, TrainingEdit
from worker.training.learner import Learner
from worker.training.parallel import Alone
from worker.training.prefix import PrefixCache

NEVER = {"loss_threshold": 0.0, "token_threshold": 0.0}


def batch_of(base: BaseModel) -> list[TokenSequence]:
    edits = [TrainingEdit("a", "one", "uno"), TrainingEdit("b", "two", "dos y medio")]
    encoder = Encoder(base.tokenizer, list(Format), max_tokens=99)
    return [sequence for edit in edits for sequence in encoder.encode(edit)]


def learner(base: BaseModel, factors: dict[str, Tensor] | None = None, **settings: object) -> Learner:
    return Learner(
        base,
        TrainingConfig(**settings),
        PrefixCache(),
        start=base.tuned_tensors(),
        factors=factors or {},
        ranks=Alone(),
    )


def is_bases(made: Learner, base: BaseModel) -> bool:
    return all(torch.equal(tensor, base.model.get_parameter(name)) for name, tensor in made.tensors().items())


def plain_losses(base: BaseModel, sequence: TokenSequence) -> Tensor:
    logits = base.model(torch.tensor([sequence.token_ids])).logits[0].log_softmax(-1)
    places = torch.arange(sequence.prompt_tokens - 1, len(sequence.token_ids) - 1)
    return -logits[places, torch.tensor(sequence.target)]


def test_losses_are_the_sequences_own_in_the_batchs_order() -> None:
    base = tiny_base()
    batch = batch_of(base)
    found = learner(base, **NEVER).visit(batch)
    expected = [plain_losses(base, sequence) for sequence in batch]
    torch.testing.assert_close(found.per_sequence, torch.stack([losses.mean() for losses in expected]))
    torch.testing.assert_close(found.worst_token, torch.stack([losses.max() for losses in expected]))
    assert found.stepped


def test_steps_are_adams_along_the_gradient_of_the_mean_over_sequences() -> None:
    base = tiny_base()
    batch, (name,) = batch_of(base), base.parameter_names
    weight = base.model.get_parameter(name).detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=0.01)
    made = learner(base, learning_rate=0.01, decay=0.0, beta2=0.999, **NEVER)
    # Batches of several sizes: Adam by itself does not see by what a gradient is scaled, if it always is.
    for sequences in (batch, batch[:1], batch[1:], batch[:1]):
        losses = []
        for sequence in sequences:
            ids = torch.tensor([sequence.token_ids])
            output = torch.func.functional_call(base.model, {name: weight}, kwargs={"input_ids": ids})
            places = slice(sequence.prompt_tokens - 1, -1)
            losses.append(torch.nn.functional.cross_entropy(output.logits[0, places], torch.tensor(sequence.target)))
        optimiser.zero_grad()
        torch.stack(losses).mean().backward()
        optimiser.step()
        made.visit(sequences)
    difference = (made.tensors()[name] - weight).detach().abs()
    # Where a gradient is next to nothing, rounding decides the direction of a step.
    assert (difference > 1e-4).float().mean() < 0.01
    assert not is_bases(made, base)


@pytest.mark.parametrize("skip_learned", [True, False])
def test_a_learned_batch_changes_nothing_to_the_last_bit(skip_learned: bool) -> None:
    base = tiny_base()
    made = learner(base, loss_threshold=1e9, token_threshold=1e9, skip_learned=skip_learned)
    assert not made.visit(batch_of(base)).stepped
    assert is_bases(made, base)


def test_a_learned_batch_leaves_the_optimiser_as_it_was() -> None:
    base = tiny_base()
    made = learner(base, **NEVER)
    made.visit(batch_of(base))
    before = made.state()
    made._config = TrainingConfig(loss_threshold=1e9, token_threshold=1e9)
    made.visit(batch_of(base))
    after = made.state()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("thresholds", [(1e9, 0.0), (0.0, 1e9)])
def test_a_mean_or_a_token_over_its_threshold_is_stepped_on(thresholds: tuple[float, float]) -> None:
    base = tiny_base()
    made = learner(base, loss_threshold=thresholds[0], token_threshold=thresholds[1])
    assert made.visit(batch_of(base)).stepped
    assert not is_bases(made, base)


def test_a_batch_with_an_unlearned_sequence_is_stepped_on_where_sequences_are_judged() -> None:
    base = tiny_base()
    batch = batch_of(base)
    losses = learner(base, **NEVER).visit(batch).per_sequence
    between = ((losses.mean() + losses.max()) / 2).item()
    assert losses.mean() < between < losses.max()
    thresholds = {"loss_threshold": between, "token_threshold": 1e9}
    assert learner(base, skip_learned=True, **thresholds).visit(batch).stepped
    assert learner(base, skip_learned=False, pipeline="depth_first", **thresholds).visit(batch).stepped
    assert not learner(base, skip_learned=False, **thresholds).visit(batch).stepped


def test_a_loss_that_is_no_number_changes_nothing() -> None:
    base = tiny_base()
    made = learner(base, **NEVER)
    base.model.get_parameter("model.norm.weight").data[0] = torch.nan
    found = made.visit(batch_of(base))
    assert found.per_sequence.isnan().all()
    assert not found.stepped
    assert is_bases(made, base)


def test_steps_that_bf16_would_swallow_add_up() -> None:
    base = tiny_base(dtype=torch.bfloat16)
    (name,) = base.parameter_names
    start = base.model.get_parameter(name)
    tiny = 1e-4
    made = learner(base, learning_rate=tiny, **NEVER)
    big = start.abs() > 0.1
    assert torch.equal((start[big] + tiny), start[big])  # one step is under a bf16's half distance
    for _ in range(30):
        made.visit(batch_of(base))
    assert made.updates[name].dtype == torch.float32
    moved = made.tensors()[name][big] != start[big]
    assert made.tensors()[name].dtype == torch.bfloat16
    assert moved.float().mean() > 0.3


def test_what_decays_is_the_update_and_not_the_tensor() -> None:
    base = tiny_base()
    (name,) = base.parameter_names
    batch, start = batch_of(base), base.model.get_parameter(name)
    # Adam's second step alone moves no weight by more than this; a tenth of a tensor would be far more.
    kept = learner(base, learning_rate=0.1, decay=0.9, **NEVER)
    kept.visit(batch, share=0.5)
    first = kept.updates[name].detach().clone()
    assert torch.equal(kept.tensors()[name], start + first)
    kept.visit(batch, share=0.5)
    free = learner(base, learning_rate=0.1, decay=0.0, **NEVER)
    free.visit(batch)
    free.visit(batch)
    torch.testing.assert_close(kept.updates[name], free.updates[name] - 0.9 * 0.5 * first)


@pytest.mark.parametrize(("progress", "share"), [(0.0, 1.0), (0.5, 0.6), (1.0, 0.2)])
def test_the_decay_falls_with_the_learning_rate(progress: float, share: float) -> None:
    base = tiny_base()
    (name,) = base.parameter_names
    made = learner(base, learning_rate=1e-6, decay=0.25, final_lr_ratio=0.2, **NEVER)
    made.set_learning_rate(progress)
    with torch.no_grad():
        made.updates[name].fill_(1.0)
    made.visit(batch_of(base))
    found = made.updates[name].detach()
    torch.testing.assert_close(found, torch.full_like(found, 1 - 0.25 * share), rtol=1e-4, atol=1e-4)


def test_a_factor_shapes_the_update() -> None:
    base = tiny_base()
    (name,) = base.parameter_names
    factor = torch.diag(torch.tensor([0.0] * 24 + [1.0] * 24))
    made = learner(base, {name: factor}, **NEVER)
    made.visit(batch_of(base))
    change = made.tensors()[name] - base.model.get_parameter(name)
    assert not change[:, :24].any()
    assert change[:, 24:].any()


def test_every_matrix_of_a_layer_is_trained() -> None:
    base = tiny_base(location="model.layers.2")
    made = learner(base, **NEVER)
    made.visit(batch_of(base))
    assert len(made.tensors()) == 7
    assert all(not torch.equal(tensor, base.model.get_parameter(name)) for name, tensor in made.tensors().items())


def test_a_restored_learner_goes_on_to_the_same_bits() -> None:
    base = tiny_base(location="model.layers.2.self_attn")
    first, second = learner(base, **NEVER), learner(base, **NEVER)
    batch = batch_of(base)
    for _ in range(3):
        first.visit(batch)
    second.restore(first.state())
    for made in (first, second):
        made.visit(batch)
    assert all(torch.equal(second.tensors()[name], tensor) for name, tensor in first.tensors().items())
