"""What a request may ask of a node at most: within the buffers that the installed vLLM has for one on a GPU."""

import pytest
from vllm import envs
from vllm.v1.worker.gpu.sample import logit_bias

from service.errors import InvalidRequestError
from service.gateway.bounds import MOST_BAD_WORDS_BYTES, MOST_ENTRIES, check


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("allowed_token_ids", [1] * 1024),
        ("logit_bias", {str(token): 1 for token in range(1024)}),
        ("stop_token_ids", [1] * 100),
        ("bad_words", ["a"] * 50),
        ("bad_words", ["é" * 225]),
    ],
)
def test_as_much_as_a_bound_passes_and_one_more_is_refused(name: str, most: list[object] | dict[str, object]) -> None:
    check({name: most})
    more = {**most, "more": 1} if isinstance(most, dict) else [*most, "a"]
    with pytest.raises(InvalidRequestError, match=f"{name}: at most") as refused:
        check({name: more})
    assert refused.value.param == name


@pytest.mark.parametrize("name", dict(MOST_ENTRIES))
@pytest.mark.parametrize("given", [None, "a" * 2000, 5, []])
def test_what_is_no_list_is_the_nodes_to_refuse(name: str, given: object) -> None:
    check({name: given})


def test_the_bounds_are_within_what_a_node_has_room_for() -> None:
    most = dict(MOST_ENTRIES)
    assert most["allowed_token_ids"] <= logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS
    assert most["logit_bias"] <= logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS
    assert most["stop_token_ids"] <= logit_bias.MAX_NUM_STOP_TOKEN_IDS - 20, "room for the model's own"
    words = most["bad_words"]
    assert 2 * words <= envs.VLLM_MAX_NUM_BAD_WORDS
    assert 2 * (MOST_BAD_WORDS_BYTES + words) <= envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
