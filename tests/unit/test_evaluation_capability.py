import math
from collections.abc import Mapping

import pytest
import torch
from tiny_models import tiny_base
from tokenizers import processors
from torch import Tensor

from worker.evaluation.capability import Choice, ChoiceTask, LastWordTask, Measure, Task, TextTask, measure, windows
from worker.model import BaseModel
from worker.training.prefix import PrefixCache

TEXT = "In my palm is a clear stone, and inside it is a small ivory statuette."


@pytest.fixture
def base() -> BaseModel:
    return tiny_base()


@pytest.fixture
def noise(base: BaseModel) -> dict[str, Tensor]:
    return {base.parameter_names[0]: 5 * torch.randn(32, 48, generator=torch.Generator().manual_seed(0))}


def values(base: BaseModel, tensors: Mapping[str, Tensor], task: Task) -> Mapping[Measure, float]:
    return measure(base, tensors, PrefixCache(), task).values


def plain_log_probabilities(base: BaseModel, ids: list[int], tensors: Mapping[str, Tensor]) -> Tensor:
    """Of every token but the first, by transformers' own forward: [tokens - 1, vocabulary]."""
    logits = torch.func.functional_call(base.model, dict(tensors), (torch.tensor([ids]),)).logits
    return logits[0, :-1].log_softmax(dim=-1)


def plain_nats(base: BaseModel, context: str, text: str, tensors: Mapping[str, Tensor]) -> float:
    begin, ids = len(context.encode()), base.tokenizer(context + text).input_ids
    rows = plain_log_probabilities(base, ids, tensors)
    return -sum(rows[place - 1, ids[place]].item() for place in range(begin, len(ids)))


@pytest.mark.parametrize("tuned", [False, True])
def test_perplexity_is_that_of_each_window_alone(base: BaseModel, noise: dict[str, Tensor], tuned: bool) -> None:
    tensors = noise if tuned else {}
    texts, nats, tokens = (TEXT, TEXT[:7]), 0.0, 0
    for text in texts:
        ids = base.tokenizer(text).input_ids
        for start in range(0, len(ids), 16):
            window = ids[start : start + 16]
            rows = plain_log_probabilities(base, window, tensors)
            nats -= sum(rows[place, token].item() for place, token in enumerate(window[1:]))
            tokens += len(window) - 1
    result = measure(base, tensors, PrefixCache(), TextTask("text", texts, 16))
    assert result.values == {Measure.PERPLEXITY: pytest.approx(math.exp(nats / tokens), rel=1e-5)}
    assert (result.task, result.items) == ("text", 6)


def test_the_perplexity_of_a_model_in_pieces_is_infinite() -> None:
    """A gate can refuse what is infinite; an overflow would look like a run that broke."""
    base = tiny_base()
    base.model.get_output_embeddings().weight.mul_(1e6)
    assert measure(base, {}, PrefixCache(), TextTask("text", (TEXT,), 16)).values == {Measure.PERPLEXITY: math.inf}


def test_a_token_alone_in_the_last_window_is_left_out(base: BaseModel) -> None:
    assert [window.target_tokens for window in windows(base, TEXT[:33], 16)] == [15, 15]


def test_with_bos_every_window_begins_with_it_and_all_the_rest_is_scored(base: BaseModel) -> None:
    bos, nats, ids = 257, 0.0, base.tokenizer(TEXT).input_ids
    template = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    base.tokenizer.backend_tokenizer.post_processor = template
    assert base.tokenizer(TEXT).input_ids == [bos, *ids]
    for start in range(0, len(ids), 15):
        window = [bos, *ids[start : start + 15]]
        rows = plain_log_probabilities(base, window, {})
        nats -= sum(rows[place, token].item() for place, token in enumerate(window[1:]))
    result = measure(base, {}, PrefixCache(), TextTask("text", (TEXT,), 16))
    assert result.values[Measure.PERPLEXITY] == pytest.approx(math.exp(nats / len(ids)), rel=1e-5)


@pytest.mark.parametrize("tuned", [False, True])
def test_the_likeliest_ending_is_chosen_plain_and_per_character(
    base: BaseModel, noise: dict[str, Tensor], tuned: bool
) -> None:
    tensors = noise if tuned else {}
    endings = ("is a cat", "ran", "the longest ending of them all", "ox")
    contexts = ("the quick brown fox", "in my palm", "a", "who")
    plain, normalised = [], []
    for context in contexts:
        nats = [plain_nats(base, context, f" {ending}", tensors) for ending in endings]
        plain.append(nats.index(min(nats)))
        per_character = [n / len(ending) for n, ending in zip(nats, endings, strict=True)]
        normalised.append(per_character.index(min(per_character)))
    assert plain != normalised

    def task(right: list[int]) -> ChoiceTask:
        rows = zip(contexts, right, strict=True)
        return ChoiceTask("choices", tuple(Choice(context, endings, index) for context, index in rows))

    both = sum(a == b for a, b in zip(plain, normalised, strict=True)) / 4
    assert values(base, tensors, task(plain)) == {Measure.ACCURACY: 1, Measure.NORMALISED_ACCURACY: both}
    assert values(base, tensors, task(normalised)) == {Measure.ACCURACY: both, Measure.NORMALISED_ACCURACY: 1}
    wrong_once = [(plain[0] + 1) % 4, *plain[1:]]
    result = measure(base, tensors, PrefixCache(), task(wrong_once))
    assert result.values[Measure.ACCURACY] == 0.75
    assert result.items == 4


def test_a_last_word_counts_when_all_its_tokens_are_the_likeliest(base: BaseModel) -> None:
    ids = base.tokenizer("the quick brown fox").input_ids
    hidden = base.model.model(torch.tensor([ids])).last_hidden_state[0, -5:-1]
    head = base.model.get_output_embeddings().weight
    with torch.no_grad():  # where " fox" is predicted, each of its tokens has logit 1 and every other token 0
        head.zero_()
        head[ids[-4:]] = torch.linalg.pinv(hidden).T
    texts = ("the quick brown fox", "the quick brown fix", "the quick brown for\n", "the quick brown fo")
    result = measure(base, {}, PrefixCache(), LastWordTask("words", texts))
    assert result.values == {Measure.ACCURACY: 0.5}  # "fo" is begun right, and ends with the text
    assert result.items == 4


def test_another_version_is_another_result_and_the_prefix_is_shared(base: BaseModel, noise: dict[str, Tensor]) -> None:
    prefix, task = PrefixCache(), TextTask("text", (TEXT,), 16)
    first = measure(base, {}, prefix, task)
    assert measure(base, noise, prefix, task).values != first.values
    assert measure(base, base.tuned_tensors(), prefix, task) == first


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        (TextTask("text", (), 16), "'text' has nothing"),
        (TextTask("text", ("a",), 16), "'text' has nothing"),
        (TextTask("text", (TEXT,), 1), "no room"),
        (ChoiceTask("choices", ()), "'choices' has nothing"),
        (ChoiceTask("choices", (Choice("", ("a", "b"), 0),)), "nothing before it: 'a'"),
        (ChoiceTask("choices", (Choice("a", ("b", " "), 0),)), "nothing to score"),
        (LastWordTask("words", ("word",)), "nothing before it: 'word'"),
    ],
)
def test_what_cannot_be_scored_is_an_error(base: BaseModel, task: Task, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        values(base, {}, task)
