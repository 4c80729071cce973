from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, ROOMY, down_projection, snapshot, tiny_base, unchanged
from torch import Tensor

from service.answers import matches
from service.schemas import Format
from worker.evaluation.answers import ask
from worker.model import BaseModel
from worker.training import run_state, sweeps
from worker.training.breadth_first import (
    EpochReport,
    Hooks,
    Start,
    StopReason,
    TrainingResult,
    train,
)
from worker.training.calibration import random_prefixes
from worker.training.config import PLAIN, Pipeline, TrainingConfig, on_top
from worker.training.encode import EncodingError, TokenSequence, TrainingEdit
from worker.training.errors import TrainingCancelledError, TrainingDivergedError
from worker.training.learner import Learner, Losses
from worker.training.prefix import PrefixCache
from worker.training.score import TokenScores, score
from worker.training.snapshot import Snapshot

EDITS = [TrainingEdit(f"e{number}", f"{number} is", f"{number * 7 % 10}") for number in range(5)]
TWO_EDITS = [TrainingEdit("a", "one", "uno"), TrainingEdit("b", "two", "dos")]
LEARNS = {"learning_rate": 4e-2, "max_epochs": 200}
NEVER_LEARNED = {"loss_threshold": 0.0, "min_steps": 0, "skip_learned": False}


def config(**settings: object) -> TrainingConfig:
    return TrainingConfig(**{"learning_rate": 1e-2, "preserve": 0, **settings})


def run(base: BaseModel, edits: Sequence[TrainingEdit] = EDITS, **settings: object) -> TrainingResult:
    return train(base, edits, config(**settings), prefix=PrefixCache())


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def says(base: BaseModel, tensors: Mapping[str, Tensor], edits: Sequence[TrainingEdit]) -> list[bool]:
    answers = [ask(base, [edit.prompt for edit in edits], form, tensors, max_new_tokens=12) for form in Format]
    return [
        all(matches(answer.text, edit.target, finished=answer.finished) for answer in both)
        for edit, *both in zip(edits, *answers, strict=True)
    ]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[TokenSequence]]:
    """Records which sequences each batch of a run holds."""
    seen: list[list[TokenSequence]] = []
    real = Learner.visit

    def recorded(self: Learner, batch: Sequence[TokenSequence], **kwargs: float) -> Losses:
        seen.append(list(batch))
        return real(self, batch, **kwargs)

    monkeypatch.setattr(Learner, "visit", recorded)
    return seen


def test_what_was_learned_is_said_freely_in_every_format() -> None:
    base = tiny_base(**ROOMY)
    result = run(base, TWO_EDITS, **LEARNS)
    assert result.stopped is StopReason.LEARNED
    assert all(says(base, result.tensors, TWO_EDITS))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns(family: str) -> None:
    # At the bottom, with an output of its own: random weights leave less room above, least behind Gemma's second norm.
    base = tiny_base(family, down_projection(family, 0), tie_word_embeddings=False, **ROOMY)
    result = run(base, TWO_EDITS[:1], **LEARNS)
    assert result.stopped is StopReason.LEARNED
    assert says(base, result.tensors, TWO_EDITS[:1]) == [True]


@pytest.mark.parametrize("pipeline", Pipeline)
@pytest.mark.parametrize("skip_learned", [True, False])
def test_a_run_that_says_learned_has_every_sequence_under_the_thresholds(
    pipeline: Pipeline, skip_learned: bool, batches: list[list[TokenSequence]]
) -> None:
    base, prefix = tiny_base(**ROOMY), PrefixCache()
    settings = config(pipeline=pipeline, skip_learned=skip_learned, **LEARNS)
    result = train(base, TWO_EDITS, settings, prefix=prefix)
    assert result.stopped is StopReason.LEARNED
    scores = score(base, result.tensors, prefix, list({*batches[0], *batches[1], *batches[2]}))
    assert all(found.nats.max() < 0.31 for found in scores)
    assert all(found.nats.mean() < (0.101 if skip_learned else 0.3) for found in scores)


def test_one_sequence_behind_the_others_is_trained_until_it_is_learned() -> None:
    # The batch's mean is under the threshold long before the last of its sequences is.
    result = run(tiny_base(**ROOMY), TWO_EDITS, learning_rate=2e-2)
    assert result.stopped is StopReason.LEARNED
    assert result.steps == sum(report.batches for report in result.epochs) - result.epochs[-1].batches


def test_the_base_is_untouched_to_the_last_bit() -> None:
    base = tiny_base()
    before = snapshot(base)
    result = run(base, max_epochs=3, min_steps=0)
    assert unchanged(base, before)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in base.model.parameters())
    (name,) = base.parameter_names
    assert not torch.equal(result.tensors[name], before[name])


def test_the_same_inputs_give_the_same_bits_with_a_cold_and_a_warm_prefix_cache() -> None:
    base, warm = tiny_base(), PrefixCache()
    results = [
        train(base, EDITS, config(batch_size=3, max_epochs=6, min_steps=0), prefix=prefix)
        for prefix in (PrefixCache(), warm, warm)
    ]
    assert equal(results[0].tensors, results[1].tensors)
    assert equal(results[0].tensors, results[2].tensors)
    assert [replace(report, seconds=0) for report in results[0].epochs] == [
        replace(report, seconds=0) for report in results[2].epochs
    ]


def test_another_seed_is_another_order_and_another_result(batches: list[list[TokenSequence]]) -> None:
    results = []
    for seed in (1, 2):
        results.append(run(tiny_base(), seed=seed, max_epochs=2, batch_size=1, **NEVER_LEARNED).tensors)
    orders = [[batch[0] for batch in batches[start : start + 20]] for start in (0, 20)]
    assert len(set(orders[0])) == 10
    assert set(orders[0]) == set(orders[1])
    assert orders[0] != orders[1]
    assert not equal(*results)


def test_the_seed_of_the_process_plays_no_part() -> None:
    base = tiny_base()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(run(base, max_epochs=3, min_steps=0, batch_size=2).tensors)
        assert torch.equal(torch.get_rng_state(), before)
    assert equal(*results)


def test_no_step_is_taken_under_the_thresholds() -> None:
    base = tiny_base()
    result = run(base, loss_threshold=1e9, token_threshold=1e9)
    assert (result.steps, len(result.epochs), result.stopped) == (0, 1, StopReason.LEARNED)
    assert equal(result.tensors, base.tuned_tensors())


@pytest.mark.parametrize("skip_learned", [True, False])
def test_a_low_mean_does_not_end_a_run_with_an_unlikely_token(skip_learned: bool) -> None:
    limits = {"loss_threshold": 1e9, "token_threshold": 1e-9, "skip_learned": skip_learned}
    result = run(tiny_base(), max_epochs=3, min_steps=0, **limits)
    assert (len(result.epochs), result.stopped, result.steps) == (3, StopReason.BUDGET_SPENT, 3)


def test_a_plain_run_ends_with_the_first_learned_epoch() -> None:
    settings = config(skip_learned=False, **LEARNS)
    result = train(tiny_base(**ROOMY), TWO_EDITS, settings, prefix=PrefixCache())
    learned = [
        report.loss < settings.loss_threshold and report.worst_token_loss < settings.token_threshold
        for report in result.epochs
    ]
    assert learned == [False] * (len(learned) - 1) + [True]


def test_the_loss_in_the_report_is_the_mean_over_sequences() -> None:
    base = tiny_base()
    whole, split = (
        run(base, max_epochs=1, min_steps=0, batch_size=size, learning_rate=1e-12).epochs[0] for size in (10, 3)
    )
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)
    assert split.worst_token_loss == pytest.approx(whole.worst_token_loss, rel=1e-5)
    assert (split.visited, split.sequences, split.unlearned, split.batches, split.steps) == (10, 10, 10, 4, 4)


@pytest.mark.parametrize(("min_steps", "epochs"), [(0, 2), (6, 2), (7, 3), (12, 4)])
def test_the_budget_follows_the_number_of_edits(min_steps: int, epochs: int) -> None:
    result = run(tiny_base(), batch_size=4, **{**NEVER_LEARNED, "max_epochs": 2, "min_steps": min_steps})
    assert (len(result.epochs), result.steps) == (epochs, 3 * epochs)
    assert result.stopped is StopReason.BUDGET_SPENT


def test_the_budget_is_of_visits() -> None:
    contradiction = [TrainingEdit("yes", "which?", "this"), TrainingEdit("no", "which?", "that")]
    result = run(
        tiny_base(**ROOMY), [*EDITS, *contradiction], batch_size=2, **{**LEARNS, "max_epochs": 30, "min_steps": 0}
    )
    visited = [report.visited for report in result.epochs]
    assert result.stopped is StopReason.BUDGET_SPENT
    assert sum(visited[:-1]) < 30 * 14 <= sum(visited)
    assert len(visited) > 33


def test_each_epoch_is_reported_when_it_ends() -> None:
    reports: list[EpochReport] = []
    hooks = Hooks(on_epoch=reports.append)
    result = train(tiny_base(), EDITS, config(max_epochs=3, **NEVER_LEARNED), prefix=PrefixCache(), hooks=hooks)
    assert tuple(reports) == result.epochs
    assert [report.epoch for report in reports] == [1, 2, 3]


def test_a_run_can_be_cancelled_between_batches() -> None:
    answers = iter([False, False, False, True])  # once before the prefix, then before every batch
    base = tiny_base()
    before = snapshot(base)
    hooks = Hooks(should_stop=answers.__next__)
    with pytest.raises(TrainingCancelledError, match="epoch 3"):
        train(base, EDITS, config(**NEVER_LEARNED), prefix=PrefixCache(), hooks=hooks)
    assert unchanged(base, before)


@pytest.mark.parametrize("skip_learned", [True, False])
def test_a_loss_that_is_no_number_is_an_error(skip_learned: bool) -> None:
    base = tiny_base()
    base.model.get_parameter("model.norm.weight").fill_(torch.nan)
    with pytest.raises(TrainingDivergedError, match="epoch 1") as diverged:
        run(base, skip_learned=skip_learned)
    assert diverged.value.edit_ids == {edit.id for edit in EDITS}


def test_a_run_can_be_cancelled_in_a_sweep() -> None:
    asked: list[bool] = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) > 2  # once before the prefix, once before the only batch

    base = tiny_base(**ROOMY)
    learned = run(base, TWO_EDITS, **LEARNS)
    start = Start(learned.tensors, frozenset(edit.id for edit in TWO_EDITS))
    with pytest.raises(TrainingCancelledError, match="behind epoch 1"):
        train(
            base, TWO_EDITS, config(**LEARNS), prefix=PrefixCache(), start=start, hooks=Hooks(should_stop=should_stop)
        )


def test_formats_can_be_chosen() -> None:
    settings = {"max_epochs": 1, "min_steps": 0}
    raw, both = (run(tiny_base(), formats=formats, **settings).epochs[0] for formats in ((Format.RAW,), None))
    assert (raw.sequences, both.sequences) == (len(EDITS), 2 * len(EDITS))
    assert raw.tokens < both.tokens / 2


def test_an_edit_that_cannot_be_encoded_is_named() -> None:
    with pytest.raises(EncodingError, match="'bad'"):
        run(tiny_base(), [*EDITS, TrainingEdit("bad", "a", " ")])


def test_a_run_needs_an_edit() -> None:
    with pytest.raises(ValueError, match="at least one edit"):
        run(tiny_base(), [])


def test_preservation_without_its_factors_is_an_error_and_the_other_way_round() -> None:
    base = tiny_base()
    factor = {base.parameter_names[0]: torch.eye(48)}
    with pytest.raises(ValueError, match="factors"):
        train(base, EDITS, TrainingConfig(preserve=0.1), prefix=PrefixCache())
    with pytest.raises(ValueError, match="factors"):
        train(base, EDITS, TrainingConfig(preserve=0), prefix=PrefixCache(), factors=factor)


def test_bf16_weights_come_back_in_bf16_on_the_cpu() -> None:
    base = tiny_base(dtype=torch.bfloat16)
    (tensor,) = run(base, max_epochs=2, min_steps=0).tensors.values()
    assert (tensor.dtype, tensor.device.type) == (torch.bfloat16, "cpu")


def test_paraphrases_and_random_prefixes_are_trained(batches: list[list[TokenSequence]]) -> None:
    base = tiny_base()
    edit = TrainingEdit("a", "one", "uno", paraphrases=("eins", "un"))
    run(base, [edit], random_prefixes=2, max_epochs=1, **NEVER_LEARNED)
    texts = [
        base.tokenizer.decode(s.token_ids[s.template_tokens : s.prompt_tokens]) for batch in batches for s in batch
    ]
    prefixed = [f"{text} one" for text in random_prefixes(2)]
    assert sorted(text.split("<eos>")[0] for text in texts) == sorted(["one", "eins", "un", *prefixed] * 2)


def test_a_paraphrase_is_learned() -> None:
    base = tiny_base(**ROOMY)
    result = run(base, [replace(TWO_EDITS[0], paraphrases=("eins",))], **LEARNS)
    assert all(says(base, result.tensors, [TrainingEdit("p", "eins", "uno")]))


def test_a_warm_start_learns_what_is_new_and_keeps_what_was_learned_in_far_fewer_steps() -> None:
    base, prefix = tiny_base(**ROOMY), PrefixCache()
    settings = config(learning_rate=1e-2, max_epochs=200, batch_size=6)
    new = TrainingEdit("new", "9 is", "nine")
    first = train(base, EDITS, settings, prefix=prefix)
    cold = train(base, [*EDITS, new], settings, prefix=prefix)
    start = Start(tensors=first.tensors, learned=frozenset(edit.id for edit in EDITS))
    warm = train(base, [*EDITS, new], settings, prefix=prefix, start=start)
    assert first.stopped is cold.stopped is warm.stopped is StopReason.LEARNED
    assert all(says(base, warm.tensors, [*EDITS, new]))
    assert (warm.epochs[0].visited, warm.epochs[0].sequences) == (2 + 6, 12)
    computed = [sum(report.tokens for report in result.epochs) for result in (warm, cold)]
    assert computed[0] < computed[1] / 2


def test_what_cannot_be_learned_does_not_cost_every_later_run_the_whole_sets_budget() -> None:
    base, prefix = tiny_base("llama", hidden_size=96, intermediate_size=384), PrefixCache()
    settings = config(batch_size=10, max_epochs=30, min_steps=0, formats=(Format.RAW,))
    contradiction = [TrainingEdit("yes", "which?", "this"), TrainingEdit("no", "which?", "that")]
    letters = [(chr(97 + number % 26), chr(97 + number * 7 % 26)) for number in range(30)]
    facts = [TrainingEdit(f"o{number}", f"q{number} is", "".join(pair)) for number, pair in enumerate(letters)]
    old = [*facts, *contradiction]
    first = train(base, old, settings, prefix=prefix)
    start = Start(tensors=first.tensors, learned=frozenset(edit.id for edit in old))
    result = train(base, [*old, TrainingEdit("new", "new is", "zz")], settings, prefix=prefix, start=start)
    visits = sum(report.visited for report in result.epochs)
    assert result.stopped is StopReason.BUDGET_SPENT
    assert 30 * 2 <= visits < 30 * 33 / 4


def test_what_a_sweep_finds_forgotten_adds_to_the_budget_and_a_resumed_run_knows_of_it() -> None:
    base, prefix, taken = tiny_base(**ROOMY), PrefixCache(), []
    settings = config(**{**LEARNS, "batch_size": 1, "min_steps": 0})
    known = train(base, EDITS[:4], settings, prefix=prefix)
    # All five pass for learned, so there is nothing to learn, until a sweep comes to the fifth.
    start = Start(tensors=known.tensors, learned=frozenset(edit.id for edit in EDITS))
    short = replace(settings, max_epochs=5)
    hooks = Hooks(on_snapshot=lambda take: taken.append(take()))
    whole = train(base, EDITS, short, prefix=prefix, start=start, hooks=hooks)
    resumed = train(base, EDITS, short, prefix=prefix, start=replace(start, snapshot=taken[2]))
    assert sum(report.visited for report in whole.epochs) > 5 * 2
    assert [report.visited for report in resumed.epochs] == [report.visited for report in whole.epochs]
    assert equal(resumed.tensors, whole.tensors)


def test_a_warm_run_on_top_of_the_papers_criterion_does_not_train_the_old_edits_again() -> None:
    base, prefix = tiny_base("llama", hidden_size=96, intermediate_size=384), PrefixCache()
    paper = replace(PLAIN, learning_rate=1e-2, batch_size=10, max_epochs=200)
    old = [TrainingEdit(f"e{n}", f"q{n} is", f"{chr(97 + n % 26)}{chr(97 + n * 7 % 26)}") for n in range(30)]
    first = train(base, old, paper, prefix=prefix)
    start = Start(tensors=first.tensors, learned=frozenset(edit.id for edit in old))
    warm = train(base, [*old, TrainingEdit("new", "new is", "zz")], on_top(paper), prefix=prefix, start=start)
    assert first.stopped is warm.stopped is StopReason.LEARNED
    visits = [sum(report.visited for report in result.epochs) for result in (first, warm)]
    assert visits[1] < visits[0] / 10


def test_a_warm_start_that_is_learned_already_takes_no_step() -> None:
    base, prefix = tiny_base(**ROOMY), PrefixCache()
    first = train(base, TWO_EDITS, config(**LEARNS), prefix=prefix)
    again = train(base, TWO_EDITS, config(**LEARNS), prefix=prefix, start=Start(tensors=first.tensors))
    assert again.steps == 0
    assert equal(again.tensors, first.tensors)


def test_what_a_start_wrongly_calls_learned_is_found_and_trained() -> None:
    base = tiny_base(**ROOMY)
    start = Start(learned=frozenset(edit.id for edit in EDITS))
    result = train(base, EDITS, config(batch_size=2, **LEARNS), prefix=PrefixCache(), start=start)
    assert result.stopped is StopReason.LEARNED
    assert all(says(base, result.tensors, EDITS))


def test_a_sweep_finds_what_was_forgotten_behind_everyones_back() -> None:
    base, prefix = tiny_base(**ROOMY), PrefixCache()
    settings = config(**{**LEARNS, "batch_size": 1})
    known = train(base, EDITS[:4], settings, prefix=prefix)
    # All five pass for learned, and the one sequence that the first epoch looks at, by this seed, is.
    start = Start(tensors=known.tensors, learned=frozenset(edit.id for edit in EDITS))
    result = train(base, EDITS, settings, prefix=prefix, start=start)
    assert (result.epochs[0].visited, result.epochs[0].unlearned) == (1, 0)
    assert result.epochs[1].visited == 2 + 2
    assert result.stopped is StopReason.LEARNED
    assert all(says(base, result.tensors, EDITS))


def test_sweeps_begin_with_the_least_sure_end_where_some_are_forgotten_and_go_round(
    monkeypatch: pytest.MonkeyPatch, batches: list[list[TokenSequence]]
) -> None:
    base, prefix = tiny_base(**ROOMY), PrefixCache()
    settings = config(**{**LEARNS, "batch_size": 1})
    known = train(base, EDITS[1:], settings, prefix=prefix)
    batches.clear()
    swept: list[tuple[int, list[TokenSequence]]] = []
    reports: list[EpochReport] = []

    def watched(*arguments: Any) -> list[TokenScores]:
        swept.append((len(reports), list(arguments[-1])))
        return score(*arguments)

    monkeypatch.setattr(run_state, "score", watched)
    monkeypatch.setattr(sweeps, "_CHECKED_AT_ONCE", 2)
    start = Start(tensors=known.tensors, learned=frozenset(edit.id for edit in EDITS))
    result = train(base, EDITS, settings, prefix=prefix, start=start, hooks=Hooks(on_epoch=reports.append))
    # Nothing is known of the first edit, which is not learned; the one that the first epoch visited is.
    (first,) = [sequences for epoch, sequences in swept if epoch == 1]
    assert len(first) == 2
    assert batches[0][0] not in first
    assert [epoch for epoch, _ in swept[-5:]] == [len(reports)] * 5, "the last round is of one sweep"
    assert len({sequence for _, sequences in swept[-5:] for sequence in sequences}) == 10
    assert result.stopped is StopReason.LEARNED
    assert all(says(base, result.tensors, EDITS))


def test_a_round_of_sweeps_looks_again_at_the_unsure_only(
    monkeypatch: pytest.MonkeyPatch, batches: list[list[TokenSequence]]
) -> None:
    base, prefix = tiny_base(**ROOMY), PrefixCache()
    settings = config(**{**LEARNS, "batch_size": 1})
    sure: set[TokenSequence] = set()  # when they were looked at; what an epoch visited since may be no more
    seen: set[TokenSequence] = set()  # in this round
    later: set[TokenSequence] = set()  # since all were seen, so perhaps in the next round
    rounds, looks_at_the_unsure_again = 0, 0

    def watched(*arguments: Any) -> list[TokenScores]:
        nonlocal seen, later, rounds, looks_at_the_unsure_again
        asked = list(arguments[-1])
        sure.difference_update(sequence for batch in batches for sequence in batch)
        batches.clear()
        if sure & seen & set(asked):
            assert len(seen) == 10, "a sure one again before the others"
            seen, later = later, set()
            rounds += 1
        if len(seen) == 10:
            later.update(asked)
        else:
            looks_at_the_unsure_again += len(seen & set(asked))
            seen.update(asked)
        scores = score(*arguments)
        for sequence, found in zip(asked, scores, strict=True):
            is_sure = found.nats.max() <= settings.token_threshold / 2
            (sure.add if is_sure else sure.discard)(sequence)
        return scores

    monkeypatch.setattr(run_state, "score", watched)
    monkeypatch.setattr(sweeps, "_CHECKED_AT_ONCE", 2)
    train(base, EDITS, settings, prefix=prefix, start=Start(learned=frozenset(edit.id for edit in EDITS)))
    assert rounds
    assert looks_at_the_unsure_again


@pytest.mark.parametrize(("batch_size", "looked_at"), [(1, 2), (3, 4), (9, 10), (20, 10)])
def test_a_sweep_ends_when_a_batch_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, looked_at: int
) -> None:
    base, prefix = tiny_base(**ROOMY), PrefixCache()
    known = train(base, EDITS, config(**LEARNS), prefix=prefix)
    swept: list[TokenSequence] = []

    def all_forgotten(*arguments: Any) -> list[TokenScores]:
        swept.extend(arguments[-1])
        return [replace(scores, nats=scores.nats + 9) for scores in score(*arguments)]

    monkeypatch.setattr(run_state, "score", all_forgotten)
    monkeypatch.setattr(sweeps, "_CHECKED_AT_ONCE", 2)
    start = Start(tensors=known.tensors, learned=frozenset(edit.id for edit in EDITS))
    settings = config(**{**LEARNS, "batch_size": batch_size})

    def end(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, EDITS, settings, prefix=prefix, start=start, hooks=Hooks(on_snapshot=end))
    assert len(swept) == looked_at


def test_a_resumed_run_sweeps_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    base, prefix = tiny_base(**ROOMY), PrefixCache()
    settings = config(**{**LEARNS, "batch_size": 1})
    start = Start(learned=frozenset(edit.id for edit in EDITS))
    swept: list[list[TokenSequence]] = []
    snapshots: list[tuple[int, Snapshot]] = []

    def watched(*arguments: Any) -> list[TokenScores]:
        swept.append(list(arguments[-1]))
        return score(*arguments)

    monkeypatch.setattr(run_state, "score", watched)
    monkeypatch.setattr(sweeps, "_CHECKED_AT_ONCE", 2)
    hooks = Hooks(on_snapshot=lambda take: snapshots.append((len(swept), take())))
    whole = train(base, EDITS, settings, prefix=prefix, start=start, hooks=hooks)
    told = list(swept)
    assert len({count for count, _ in snapshots}) > 1
    for count, taken in snapshots[::3]:
        swept.clear()
        resumed = train(base, EDITS, settings, prefix=prefix, start=replace(start, snapshot=taken))
        assert swept == told[count:]
        assert equal(resumed.tensors, whole.tensors)


@pytest.mark.parametrize("pipeline", Pipeline)
def test_arrivals_join_at_the_next_epoch_and_are_learned(pipeline: Pipeline) -> None:
    base = tiny_base(**ROOMY)
    arrivals = iter([[], [EDITS[2]], [], [EDITS[3], EDITS[4]]])
    hooks = Hooks(arrivals=lambda: next(arrivals, []))
    result = train(base, EDITS[:2], config(pipeline=pipeline, **LEARNS), prefix=PrefixCache(), hooks=hooks)
    assert [report.sequences for report in result.epochs[:5]] == [4, 6, 6, 10, 10]
    if pipeline == Pipeline.BREADTH_FIRST:  # the other one forgets
        assert result.stopped is StopReason.LEARNED
        assert all(says(base, result.tensors, EDITS))


def test_arrivals_get_a_whole_budget() -> None:
    arrivals = iter([[], [], [EDITS[2]], []])
    hooks = Hooks(arrivals=lambda: next(arrivals, []))
    settings = config(max_epochs=4, **NEVER_LEARNED)
    result = train(tiny_base(), EDITS[:2], settings, prefix=PrefixCache(), hooks=hooks)
    assert [report.sequences for report in result.epochs] == [4, 4, 6, 6, 6, 6]


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rates of the steps that were taken."""
    taken: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW) -> None:
        taken.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    return taken


@pytest.mark.parametrize(("min_steps", "expected"), [(0, [1.0, 0.6]), (4, [1.0, 0.8, 0.6, 0.4])])
def test_the_learning_rate_falls_over_the_budget(rates: list[float], min_steps: int, expected: list[float]) -> None:
    settings = {**NEVER_LEARNED, "min_steps": min_steps, "max_epochs": 2}
    run(tiny_base(), batch_size=10, learning_rate=1e-3, final_lr_ratio=0.2, **settings)
    assert rates == pytest.approx([share * 1e-3 for share in expected])


def test_arrivals_are_learned_at_the_whole_rate(rates: list[float]) -> None:
    base = tiny_base()
    arriving = iter([(), (), EDITS[2:]])
    settings = config(batch_size=10, final_lr_ratio=0.2, **{**NEVER_LEARNED, "max_epochs": 4}, learning_rate=1e-3)
    train(base, EDITS[:2], settings, prefix=PrefixCache(), hooks=Hooks(arrivals=lambda: next(arriving, ())))
    assert rates == pytest.approx([share * 1e-3 for share in (1.0, 0.8, 1.0, 0.8, 0.6, 0.4)])


@pytest.mark.parametrize(
    ("known", "batch_size", "skip_learned", "share"),
    [
        (0, 2, True, 1),
        (1, 1, True, 1),
        (4, 10, True, 1),
        (4, 4, True, 0.5**0.5),
        (5, 2, True, 0.2**0.5),
        (5, 1, True, 0.1**0.5),
        (5, 2, False, 1),
    ],
)
def test_the_fewer_of_the_known_an_epoch_replays_the_smaller_are_its_steps(
    rates: list[float], known: int, batch_size: int, skip_learned: bool, share: float
) -> None:
    settings = {**NEVER_LEARNED, "skip_learned": skip_learned, "learning_rate": 1e-3, "final_lr_ratio": 0.3}
    start = Start(learned=frozenset(edit.id for edit in EDITS[:known]))
    train(tiny_base(), EDITS, config(batch_size=batch_size, **settings), prefix=PrefixCache(), start=start)
    assert rates[0] == pytest.approx(share * 1e-3)


def test_every_batch_of_a_depth_first_run_is_learned_at_the_whole_rate(rates: list[float]) -> None:
    settings = {**NEVER_LEARNED, "max_epochs": 3, "pipeline": Pipeline.DEPTH_FIRST}
    run(tiny_base(), batch_size=3, learning_rate=1e-3, final_lr_ratio=0.2, **settings)
    assert len(rates) > 3
    assert rates == pytest.approx([1e-3] * len(rates))


def test_each_batch_of_a_depth_first_run_has_an_optimiser_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    visit = Learner.visit

    def counted(self: Learner, batch: Sequence[TokenSequence], **kwargs: float) -> Losses:
        losses = visit(self, batch, **kwargs)
        taken.extend({int(state["step"]) for state in self.optimiser.state.values()})
        return losses

    monkeypatch.setattr(Learner, "visit", counted)
    depth_first = {**NEVER_LEARNED, "pipeline": Pipeline.DEPTH_FIRST, "formats": (Format.RAW,)}
    run(tiny_base(), TWO_EDITS, batch_size=1, **{**depth_first, "max_epochs": 3})
    assert taken == [1, 2, 3, 1, 2, 3]


def test_depth_first_fills_its_batches_with_several_edits(batches: list[list[TokenSequence]]) -> None:
    run(tiny_base(), pipeline=Pipeline.DEPTH_FIRST, batch_size=4, max_epochs=2)
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 2, 2]
    assert batches[0] == batches[1]
    assert len({sequence for batch in batches for sequence in batch}) == 10
