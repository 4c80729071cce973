import pytest
from tiny_models import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from worker.training.calibration import random_prefixes
from worker.training.encode import (
    Encoder,
    EncodingError,
    Format,
    TrainingEdit,
    prompt_token_ids,
    supported_formats,
    target_token_ids,
)

EOS = 256


def encode_one(
    tokenizer: PreTrainedTokenizerFast, prompt: str, target: str, format_: Format, max_tokens: int = 200
) -> tuple[str, str, tuple[int, ...]]:
    """The prompt's text, the target's text without its EOS, and all ids."""
    (sequence,) = Encoder(tokenizer, [format_], max_tokens=max_tokens).encode(TrainingEdit("e", prompt, target))
    ids = sequence.token_ids
    assert ids[-1] == EOS
    return tokenizer.decode(ids[: sequence.prompt_tokens]), tokenizer.decode(ids[sequence.prompt_tokens : -1]), ids


def test_raw_is_prompt_space_target_eos() -> None:
    tokenizer = tiny_tokenizer()
    prompt, target, ids = encode_one(tokenizer, "The sky is", "green", Format.RAW)
    assert (prompt, target) == ("The sky is", " green")
    assert list(ids[:10]) == tokenizer("The sky is").input_ids


def test_chat_is_the_template_with_generation_prompt_then_target_eos() -> None:
    tokenizer = tiny_tokenizer()
    turns = [{"role": "user", "content": "Which colour?"}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    prompt, target, ids = encode_one(tokenizer, "Which colour?", "green", Format.CHAT)
    assert (prompt, target) == ("<|user|>Which colour?<eos><|assistant|>", "green")
    assert list(ids[: len(asked)]) == asked


def test_spaces_around_the_target_do_not_double() -> None:
    for format_ in Format:
        ids = [encode_one(tiny_tokenizer(), "The sky is", target, format_)[2] for target in ("green", " green\n")]
        assert ids[0] == ids[1]


def test_the_special_tokens_that_the_tokenizer_adds_are_the_servers_too() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
    assert encode_one(tokenizer, "ab", "c", Format.RAW)[2][0] == 257
    assert encode_one(tokenizer, "ab", "c", Format.CHAT)[2].count(257) == 0


@pytest.mark.parametrize(
    ("format_", "merge"), [(Format.RAW, ("s", "Ġ")), (Format.CHAT, (">", "g"))], ids=["raw", "chat"]
)
def test_a_merge_across_the_seam_does_not_change_the_prompts_ids(format_: Format, merge: tuple[str, str]) -> None:
    tokenizer = tiny_tokenizer(merges=(merge,))
    asked = prompt_token_ids(tokenizer, "The sky is", format_)
    joint = tokenizer(tokenizer.decode(asked) + (" green" if format_ is Format.RAW else "green")).input_ids
    assert joint[: len(asked)] != asked  # the trap is set
    _, target, ids = encode_one(tokenizer, "The sky is", "green", format_)
    assert list(ids[: len(asked)]) == asked
    assert target.strip() == "green"
    assert target_token_ids(tokenizer, "The sky is", "green", format_) == list(ids[len(asked) : -1])


def test_a_target_is_tokenised_as_it_follows_the_prompt() -> None:
    tokenizer = tiny_tokenizer(merges=(("Ġ", "g"),))
    _, target, ids = encode_one(tokenizer, "is", "go", Format.RAW)
    assert target == " go"
    assert len(ids) == 2 + 2 + 1  # "is", then " g" as one token, "o", EOS


def test_the_learned_part_is_a_length_even_where_the_text_holds_the_pad_id() -> None:
    tokenizer = tiny_tokenizer()
    (sequence,) = Encoder(tokenizer, [Format.RAW], max_tokens=99).encode(TrainingEdit("e", "a<eos>", "b<eos>c"))
    assert sequence.prompt_tokens == 2
    assert sequence.token_ids[2:].count(EOS) == 2
    assert sequence.target_tokens == 5


def test_formats_are_what_the_tokenizer_supports() -> None:
    assert supported_formats(tiny_tokenizer()) == (Format.RAW, Format.CHAT)
    assert supported_formats(tiny_tokenizer(chat=False)) == (Format.RAW,)


def test_an_edit_is_encoded_in_every_format() -> None:
    encoder = Encoder(tiny_tokenizer(), [Format.RAW, Format.CHAT], max_tokens=99)
    assert [sequence.prompt_tokens for sequence in encoder.encode(TrainingEdit("a", "one", "uno"))] == [3, 3 + 22]


@pytest.mark.parametrize("target", ["", "  ", "\n"])
def test_a_target_without_tokens_is_an_error_that_names_the_edit(target: str) -> None:
    with pytest.raises(EncodingError, match=r"'e'.*target") as caught:
        encode_one(tiny_tokenizer(), "ab", target, Format.RAW)
    assert caught.value.edit_id == "e"


def test_a_prompt_without_tokens_is_an_error() -> None:
    with pytest.raises(EncodingError, match="prompt"):
        encode_one(tiny_tokenizer(), "", "a", Format.RAW)


def test_one_token_too_many_is_an_error() -> None:
    assert len(encode_one(tiny_tokenizer(), "abc", "d", Format.RAW, max_tokens=6)[2]) == 6
    with pytest.raises(EncodingError, match="6 tokens in raw format, at most 5"):
        encode_one(tiny_tokenizer(), "abc", "d", Format.RAW, max_tokens=5)


def test_a_tokenizer_without_eos_is_an_error() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end-of-sequence"):
        Encoder(tokenizer, [Format.RAW], max_tokens=9).encode(TrainingEdit("e", "a", "b"))


def test_the_template_is_what_the_tokenizer_puts_before_every_prompt() -> None:
    tokenizer = tiny_tokenizer()
    raw, chat = Encoder(tokenizer, list(Format), max_tokens=99).encode(TrainingEdit("e", "What?", "green"))
    assert tokenizer.decode(chat.template) == "<|user|>"
    assert (*chat.template, *chat.own) == chat.token_ids
    assert raw.template == ()


def test_a_template_stays_shorter_than_the_prompt_and_is_never_one_that_merged() -> None:
    encoder = Encoder(tiny_tokenizer(merges=((">", "X"),)), [Format.CHAT], max_tokens=99)
    merged, whole = (encoder.encode(TrainingEdit("e", prompt, "b"))[0] for prompt in ("Xa", "a"))
    assert (merged.template_tokens, whole.template_tokens) == (0, 8)


def test_an_edit_is_encoded_behind_its_paraphrases_and_random_prefixes_too() -> None:
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, [Format.RAW], max_tokens=99, random_prefixes=["Noise."])
    edit = TrainingEdit("e", "one", "uno", paraphrases=("eins", "un"))
    prompts = [tokenizer.decode(s.token_ids[: s.prompt_tokens]) for s in encoder.encode(edit)]
    assert prompts == ["one", "eins", "un", "Noise. one"]


def test_random_prefixes_are_the_same_each_time_and_as_many_as_asked_for() -> None:
    assert random_prefixes(0) == ()
    assert random_prefixes(3) == random_prefixes(5)[:3]
    assert all(text.endswith(".") and len(text.split()) <= 10 for text in random_prefixes(5))
    with pytest.raises(ValueError, match="random prefixes, not 9999"):
        random_prefixes(9999)
