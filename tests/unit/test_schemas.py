import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.schemas import EditRequest, normalise_text


@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_normalising_twice_is_normalising_once(text: str) -> None:
    assert normalise_text(normalise_text(text)) == normalise_text(text)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("What is it?", " what  IS\tit? "),
        ("STRASSE", "straße"),
        ("ﬁne", "fine"),
        ("é", "e\u0301"),
        ("a\u00a0b", "a b"),
        ("a\nb", "a b"),
    ],
)
def test_texts_of_the_same_question_are_the_same_when_normalised(left: str, right: str) -> None:
    assert normalise_text(left) == normalise_text(right)


@pytest.mark.parametrize(("left", "right"), [("a b", "ab"), ("a?", "a"), ("cafe", "café")])
def test_texts_of_other_questions_are_not_the_same_when_normalised(left: str, right: str) -> None:
    assert normalise_text(left) != normalise_text(right)


@given(st.text())
def test_a_text_is_kept_stripped_or_refused(text: str) -> None:
    try:
        kept = EditRequest(prompt=text, target="t").prompt
    except ValidationError as error:
        assert [detail["loc"] for detail in error.errors()] == [("prompt",)]
    else:
        assert kept == text.strip()
        assert kept.encode()
        assert not any(ord(character) < 32 and character not in "\t\n" for character in kept)


def test_unknown_fields_and_wrong_types_are_named() -> None:
    for field, value in (("colour", 1), ("prompt", 1), ("rephrases", "r"), ("metadata", {"k": 1})):
        with pytest.raises(ValidationError) as refused:
            EditRequest.model_validate({"prompt": "p", "target": "t", field: value})
        assert [detail["loc"][0] for detail in refused.value.errors()] == [field]


@pytest.mark.parametrize("field", ["rephrases", "paraphrases"])
def test_what_measures_is_not_trained_on(field: str) -> None:
    """Compared as prompts are; the last of the two fields to be read is the one that is named."""
    texts = {"rephrases": ["fine", "One  more"], "paraphrases": ["one MORE"] if field == "paraphrases" else []}
    with pytest.raises(ValidationError, match=r"rephrases\[1\] is trained on") as refused:
        EditRequest(prompt="one more" if field == "rephrases" else "p", target="t", **texts)
    assert [detail["loc"] for detail in refused.value.errors()] == [(field,)]
