import math

import pytest
import torch
from tiny_models import ROOMY, snapshot, tiny_base, unchanged
from torch.nn import functional

from service.schemas import Format
from worker.evaluation import capability, metrics
from worker.evaluation.capability import perplexity
from worker.evaluation.metrics import EvaluationEdit, Evaluator
from worker.evaluation.probes import capability_passages, locality_prompts
from worker.model import BaseModel
from worker.training.breadth_first import TrainingConfig, train
from worker.training.encode import TrainingEdit
from worker.training.prefix import PrefixCache

EDITS = [
    EvaluationEdit("a", "one", "uno", rephrases=("one", "an entirely different question")),
    EvaluationEdit("b", "two", "dos"),
]


@pytest.fixture(autouse=True)
def few_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "locality_prompts", lambda: locality_prompts()[:3])
    monkeypatch.setattr(
        capability, "capability_passages", lambda: tuple(text[:80] for text in capability_passages()[:5])
    )


@pytest.fixture
def base() -> BaseModel:
    return tiny_base(**ROOMY)


def trained(base: BaseModel) -> dict[str, torch.Tensor]:
    edits = [TrainingEdit(edit.id, edit.prompt, edit.target) for edit in EDITS]
    config = TrainingConfig(learning_rate=4e-2, max_epochs=200, preserve=0)
    return dict(train(base, edits, config, prefix=PrefixCache()).tensors)


def test_a_learned_set_is_reliable_and_the_untrained_base_is_not(base: BaseModel) -> None:
    evaluator = Evaluator(base, prefix=PrefixCache())
    before, after = evaluator.evaluate(EDITS, {}), evaluator.evaluate(EDITS, trained(base))
    assert set(after.formats) == set(Format)
    for format_ in Format:
        assert before.formats[format_].reliability == 0
        assert after.formats[format_].reliability == 1
        assert after.formats[format_].generalization == 0.5  # the prompt itself again, and one that is no rephrase
    assert after.edits_measured == len(EDITS)


def test_the_base_against_itself_is_local_and_as_capable(base: BaseModel) -> None:
    measured = Evaluator(base, prefix=PrefixCache()).evaluate(EDITS, base.tuned_tensors())
    assert measured.locality == 1
    assert measured.perplexity_ratio == 1


def test_noise_shows_in_locality_and_perplexity(base: BaseModel) -> None:
    noise = {base.parameter_names[0]: 20 * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))}
    measured = Evaluator(base, prefix=PrefixCache()).evaluate(EDITS, noise)
    assert measured.locality < 0.5
    assert measured.perplexity != measured.base_perplexity  # a random base has no capability to lose


def test_perplexity_is_that_of_the_whole_model(base: BaseModel) -> None:
    losses = []
    for passage in capability.capability_passages():
        ids = torch.tensor([base.tokenizer(passage).input_ids])
        losses.append(functional.cross_entropy(base.model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    expected = math.exp(torch.cat(losses).double().mean().item())
    assert perplexity(base, {}, PrefixCache()) == pytest.approx(expected, rel=1e-5)


def test_what_the_base_says_is_found_out_once(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    real = metrics.ask

    def recorded(base, prompts, format_, tensors, *, max_new_tokens):
        asked.append(bool(tensors))
        return real(base, prompts, format_, tensors, max_new_tokens=max_new_tokens)

    monkeypatch.setattr(metrics, "ask", recorded)
    evaluator = Evaluator(base, prefix=PrefixCache())
    for _ in range(3):
        evaluator.evaluate(EDITS, base.tuned_tensors(), [Format.RAW])
    assert asked.count(False) == len(Format)


def test_without_rephrases_there_is_no_generalization(base: BaseModel) -> None:
    measured = Evaluator(base, prefix=PrefixCache()).evaluate(EDITS[1:], {}, [Format.RAW])
    assert measured.formats[Format.RAW].generalization is None
    assert set(measured.formats) == {Format.RAW}


def test_the_base_is_untouched(base: BaseModel) -> None:
    before = snapshot(base)
    evaluator = Evaluator(base, prefix=PrefixCache())
    evaluator.evaluate(EDITS, trained(base))
    with pytest.raises(RuntimeError):
        evaluator.evaluate(EDITS, {base.parameter_names[0]: torch.zeros(1, 1)})
    assert unchanged(base, before)
    assert evaluator.evaluate(EDITS, {}).perplexity_ratio == 1


def test_there_must_be_something_to_evaluate(base: BaseModel) -> None:
    with pytest.raises(ValueError, match="without an edit"):
        Evaluator(base, prefix=PrefixCache()).evaluate([], {})


def test_the_shipped_probes_are_whole() -> None:
    assert len(set(locality_prompts())) == 24
    assert len(set(capability_passages())) == 19
