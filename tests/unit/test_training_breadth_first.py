import pytest
import torch
from tiny_models import ROOMY, snapshot, tiny_base, unchanged

from service.answers import matches
from service.schemas import Format
from worker.evaluation.answers import ask
from worker.model import BaseModel
from worker.training import breadth_first
from worker.training.breadth_first import (
    EpochReport,
    StopReason,
    TrainingCancelledError,
    TrainingConfig,
    TrainingDivergedError,
    TrainingResult,
    train,
)
from worker.training.encode import EncodingError, TokenSequence, TrainingEdit
from worker.training.prefix import PrefixCache

EDITS = [TrainingEdit(f"e{number}", f"{number} is", f"{number * 7 % 10}") for number in range(5)]
TWO_EDITS = [TrainingEdit("a", "one", "uno"), TrainingEdit("b", "two", "dos")]
LEARNS = {"learning_rate": 4e-2, "max_epochs": 200}
NEVER_LEARNED = {"loss_threshold": 0.0, "min_steps": 0}


def run(base: BaseModel, edits: list[TrainingEdit] = EDITS, **settings: object) -> TrainingResult:
    return train(base, edits, TrainingConfig(**{"learning_rate": 1e-2, **settings}), prefix=PrefixCache())


class BatchSpy:
    """Records which sequences each batch of a run holds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[TokenSequence]] = []
        real = breadth_first._mini_batches

        def recorded(*args):
            for batch in real(*args):
                self.batches.append(batch)
                yield batch

        monkeypatch.setattr(breadth_first, "_mini_batches", recorded)


def test_what_was_learned_is_said_freely_in_every_format() -> None:
    base = tiny_base(**ROOMY)
    result = run(base, TWO_EDITS, **LEARNS)
    assert result.stopped is StopReason.LEARNED
    for format_ in Format:
        answers = ask(base, [edit.prompt for edit in TWO_EDITS], format_, result.tensors, max_new_tokens=8)
        assert all(
            matches(answer.text, edit.target, finished=answer.finished)
            for answer, edit in zip(answers, TWO_EDITS, strict=True)
        )


def test_the_base_is_untouched_to_the_last_bit() -> None:
    base = tiny_base()
    before = snapshot(base)
    result = run(base, max_epochs=3)
    assert unchanged(base, before)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in base.model.parameters())
    (name,) = base.parameter_names
    assert not torch.equal(result.tensors[name], before[name])


def test_the_same_inputs_give_the_same_bits() -> None:
    base = tiny_base()
    first, second, other = (
        run(base, max_epochs=4),
        run(base, max_epochs=4),
        run(base, max_epochs=4, seed=1, batch_size=3),
    )
    (name,) = base.parameter_names
    assert torch.equal(first.tensors[name], second.tensors[name])
    assert not torch.equal(first.tensors[name], other.tensors[name])


def test_a_low_mean_does_not_end_a_run_with_an_unlikely_token() -> None:
    result = run(tiny_base(), max_epochs=3, min_steps=0, loss_threshold=1e9, token_threshold=1e-9)
    assert (len(result.epochs), result.stopped) == (3, StopReason.BUDGET_SPENT)


def test_another_seed_is_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []
    for seed in (1, 2):
        spy = BatchSpy(monkeypatch)
        run(tiny_base(), seed=seed, max_epochs=2, batch_size=1, **NEVER_LEARNED)
        orders.append([sequence.token_ids for batch in spy.batches for sequence in batch])
        monkeypatch.undo()
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_the_seed_of_the_process_plays_no_part() -> None:
    base = tiny_base()
    (name,) = base.parameter_names
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(run(base, max_epochs=3).tensors[name])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


def test_every_epoch_sees_every_sequence_once_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = BatchSpy(monkeypatch)
    run(tiny_base(), max_epochs=3, batch_size=4, **NEVER_LEARNED)
    assert [len(batch) for batch in spy.batches] == [4, 4, 2] * 3
    epochs = [[sequence for batch in spy.batches[start : start + 3] for sequence in batch] for start in (0, 3, 6)]
    assert [len(set(epoch)) for epoch in epochs] == [10, 10, 10]
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_no_step_is_taken_under_the_thresholds() -> None:
    base = tiny_base()
    result = run(base, loss_threshold=1e9, token_threshold=1e9)
    assert (result.steps, len(result.epochs), result.stopped) == (0, 1, StopReason.LEARNED)
    (name,) = base.parameter_names
    assert torch.equal(result.tensors[name], base.model.get_parameter(name))


def test_one_bad_token_keeps_a_batch_from_counting_as_learned() -> None:
    assert run(tiny_base(), max_epochs=1, min_steps=0, loss_threshold=1e9).steps == 1
    assert run(tiny_base(), max_epochs=1, min_steps=0, token_threshold=1e9, loss_threshold=1e-2).steps == 1


def test_a_run_ends_with_the_first_learned_epoch() -> None:
    result = run(tiny_base(**ROOMY), TWO_EDITS, **LEARNS)
    config = TrainingConfig()
    learned = [config.is_learned(report.loss, report.worst_token_loss) for report in result.epochs]
    assert learned == [False] * (len(learned) - 1) + [True]


@pytest.mark.parametrize(("mean", "worst", "learned"), [(0.009, 0.19, True), (0.01, 0.1, False), (0.001, 0.2, False)])
def test_learned_is_a_small_mean_and_no_bad_token(mean: float, worst: float, learned: bool) -> None:
    assert TrainingConfig(loss_threshold=0.01, token_threshold=0.2).is_learned(mean, worst) is learned


def test_the_loss_in_the_report_is_the_mean_over_sequences() -> None:
    base = tiny_base()
    whole = run(base, max_epochs=1, min_steps=0, batch_size=10, learning_rate=0.0)
    split = run(base, max_epochs=1, min_steps=0, batch_size=3, learning_rate=0.0)
    assert split.epochs[0].loss == pytest.approx(whole.epochs[0].loss, rel=1e-5)
    assert split.epochs[0].worst_token_loss == pytest.approx(whole.epochs[0].worst_token_loss, rel=1e-5)


@pytest.mark.parametrize(("sequences", "epochs"), [(1, 100), (2, 100), (20, 50), (40, 25), (1000, 20)])
def test_the_step_budget_follows_the_number_of_edits(sequences: int, epochs: int) -> None:
    config = TrainingConfig(batch_size=10, max_epochs=20, min_steps=100)
    assert config.epoch_budget(sequences) == epochs


def test_the_budget_bounds_a_run_that_does_not_learn() -> None:
    result = run(tiny_base(), max_epochs=2, min_steps=7, batch_size=4, loss_threshold=0.0)
    assert (len(result.epochs), result.steps, result.stopped) == (3, 9, StopReason.BUDGET_SPENT)


def test_each_epoch_is_reported_when_it_ends() -> None:
    reports: list[EpochReport] = []
    config = TrainingConfig(max_epochs=3, **NEVER_LEARNED)
    result = train(tiny_base(), EDITS, config, prefix=PrefixCache(), on_epoch=reports.append)
    assert tuple(reports) == result.epochs
    assert [(report.epoch, report.epoch_budget) for report in reports] == [(1, 3), (2, 3), (3, 3)]


def test_a_run_can_be_cancelled_between_batches() -> None:
    answers = iter([False, False, True])
    base = tiny_base()
    before = snapshot(base)
    with pytest.raises(TrainingCancelledError, match="epoch 3"):
        train(base, EDITS, TrainingConfig(**NEVER_LEARNED), prefix=PrefixCache(), should_stop=answers.__next__)
    assert unchanged(base, before)


def test_a_loss_that_is_no_number_is_an_error() -> None:
    base = tiny_base()
    base.model.get_parameter("model.norm.weight").fill_(torch.nan)
    with pytest.raises(TrainingDivergedError, match="nan in epoch 1"):
        run(base)


def test_formats_can_be_chosen() -> None:
    assert run(tiny_base(), formats=(Format.RAW,), max_epochs=1).tokens < run(tiny_base(), max_epochs=1).tokens


def test_an_edit_that_cannot_be_encoded_is_named() -> None:
    with pytest.raises(EncodingError, match="'bad'"):
        run(tiny_base(), [*EDITS, TrainingEdit("bad", "a", " ")])


def test_a_run_needs_an_edit() -> None:
    with pytest.raises(ValueError, match="at least one edit"):
        run(tiny_base(), [])


def test_bf16_weights_come_back_in_bf16_on_the_cpu() -> None:
    base = tiny_base()
    base.model.bfloat16()
    (tensor,) = run(base, max_epochs=2).tensors.values()
    assert (tensor.dtype, tensor.device.type) == (torch.bfloat16, "cpu")
