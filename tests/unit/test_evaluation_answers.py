import pytest
import torch
from tiny_models import FAMILIES, ROOMY, snapshot, tiny_base, unchanged
from transformers import GenerationConfig

from service.answers import matches
from service.schemas import Format, normalise_text
from worker.evaluation import answers
from worker.evaluation.answers import ask
from worker.model import BaseModel
from worker.training.breadth_first import TrainingConfig, train
from worker.training.encode import TrainingEdit, prompt_token_ids
from worker.training.prefix import PrefixCache

PROMPTS = ["a", "the quick brown fox", "z<eos>y", "12345678901234567890"]


def generated(base: BaseModel, prompt: str, format_: Format, max_new_tokens: int) -> tuple[int, ...]:
    """What transformers' own greedy generation says to one prompt alone."""
    ids = torch.tensor([prompt_token_ids(base.tokenizer, prompt, format_)])
    config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=256, pad_token_id=256)
    whole = base.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return tuple(whole[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format_", list(Format))
def test_a_padded_batch_says_what_generate_says_one_at_a_time(family: str, format_: Format) -> None:
    base = tiny_base(family)
    for prompt, answer in zip(PROMPTS, ask(base, PROMPTS, format_, max_new_tokens=12), strict=True):
        expected = generated(base, prompt, format_, 12)
        assert answer.token_ids == (expected[:-1] if answer.finished else expected)
        assert answer.finished == (expected[-1] == 256)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_that_end_early_leave_the_others_as_they_are(family: str) -> None:
    """The tiny models do not stop by themselves: a token that some answers contain is made an EOS, others go on."""
    base = tiny_base(family)
    alone = {prompt: ask(base, [prompt], Format.RAW, max_new_tokens=12)[0].token_ids for prompt in PROMPTS}
    stop = alone[PROMPTS[1]][2]
    base.model.generation_config = GenerationConfig(eos_token_id=[256, stop])
    limits = [12, 7, 1, 10]
    for prompt, limit, answer in zip(
        PROMPTS, limits, ask(base, PROMPTS, Format.RAW, max_new_tokens=limits), strict=True
    ):
        expected = alone[prompt][:limit]
        ends = stop in expected
        assert answer.token_ids == (expected[: expected.index(stop)] if ends else expected)
        assert answer.finished == ends


def test_order_is_kept_over_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    whole = ask(base, PROMPTS, Format.RAW, max_new_tokens=5)
    monkeypatch.setattr(answers, "BATCH_SIZE", 2)
    assert ask(base, PROMPTS, Format.RAW, max_new_tokens=5) == whole
    assert ask(base, [], Format.RAW, max_new_tokens=5) == []


def test_tuned_tensors_answer_and_the_base_stays() -> None:
    base = tiny_base()
    before = snapshot(base)
    plain = ask(base, PROMPTS, Format.RAW, max_new_tokens=8)
    tensors = {base.parameter_names[0]: 5 * torch.randn(32, 48, generator=torch.Generator().manual_seed(0))}
    assert ask(base, PROMPTS, Format.RAW, tensors, max_new_tokens=8) != plain
    assert unchanged(base, before)
    assert ask(base, PROMPTS, Format.RAW, max_new_tokens=8) == plain


def test_the_base_stays_when_answering_fails() -> None:
    base = tiny_base()
    before, weight = snapshot(base), base.tuned_tensors()
    plain = ask(base, PROMPTS, Format.RAW, max_new_tokens=8)
    with pytest.raises(RuntimeError):
        ask(base, PROMPTS, Format.RAW, {base.parameter_names[0]: torch.zeros(7, 7)}, max_new_tokens=8)
    assert unchanged(base, before)
    assert base.tuned_tensors()[base.parameter_names[0]] is weight[base.parameter_names[0]]
    assert ask(base, PROMPTS, Format.RAW, max_new_tokens=8) == plain


def test_an_answer_that_only_begins_with_the_target_does_not_match() -> None:
    """Teacher forcing finds the token "a" where it belongs; the model never stops there."""
    base = tiny_base(**ROOMY)
    config = TrainingConfig(learning_rate=4e-2, max_epochs=200, preserve=0)
    tensors = train(base, [TrainingEdit("e", "say", "ab")], config, prefix=PrefixCache()).tensors
    (answer,) = ask(base, ["say"], Format.CHAT, tensors, max_new_tokens=8)
    assert answer.text == "ab"
    assert matches(answer.text, "ab", finished=answer.finished)
    assert not matches(answer.text, "a", finished=answer.finished)
    (cut,) = ask(base, ["say"], Format.CHAT, tensors, max_new_tokens=2)
    assert (cut.text, cut.finished) == ("ab", False)
    assert not matches(cut.text, "ab", finished=cut.finished)


def test_every_eos_of_the_generation_config_stops() -> None:
    base = tiny_base()
    first = ask(base, ["a"], Format.RAW, max_new_tokens=3)[0].token_ids[0]
    base.model.generation_config = GenerationConfig(eos_token_id=[256, first])
    assert ask(base, ["a"], Format.RAW, max_new_tokens=3)[0].finished


@pytest.mark.parametrize(
    ("answer", "target"),
    [(" Paris", "paris"), ("New\n York ", "new york"), ("\uff21\uff22", "ab"), ("Straße", "STRASSE"), ("é", "e\u0301")],
)
def test_form_case_and_spaces_make_no_difference(answer: str, target: str) -> None:
    assert normalise_text(answer) == normalise_text(target)
    assert matches(answer, target, finished=True)
    assert not matches(answer, target, finished=False)


@pytest.mark.parametrize("answer", ["Paris.", "Paris, France", "Pari", ""])
def test_more_or_less_than_the_target_is_not_the_target(answer: str) -> None:
    assert not matches(answer, "Paris", finished=True)
