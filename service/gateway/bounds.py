"""What a request may ask of a node at most, said before a node is asked."""

from collections.abc import Mapping
from typing import Any

from service.errors import InvalidRequestError

# vLLM's buffers for one request on a GPU: what does not fit is found out in the middle of a batch and ends the engine,
# and with it every answer under way (v1/worker/gpu/sample). To the stop tokens the model adds its own. A bad word is
# kept in two spellings, each of a token for every byte at most, and one for the space in front.
MOST_ENTRIES = (("allowed_token_ids", 1024), ("logit_bias", 1024), ("stop_token_ids", 100), ("bad_words", 50))
MOST_BAD_WORDS_BYTES = 450


def check(body: Mapping[str, Any]) -> None:
    """Refuses what ends a node. What is no list is the node's to refuse.

    Raises:
        InvalidRequestError: a list is too long.
    """
    for name, most in MOST_ENTRIES:
        if isinstance(given := body.get(name), list | dict) and len(given) > most:
            raise InvalidRequestError(f"{name}: at most {most} entries, not {len(given)}", param=name)
    if isinstance(words := body.get("bad_words"), list):
        size = sum(len(word.encode()) for word in words if isinstance(word, str))
        if size > MOST_BAD_WORDS_BYTES:
            raise InvalidRequestError(
                f"bad_words: at most {MOST_BAD_WORDS_BYTES} bytes together, not {size}", param="bad_words"
            )


def answers(body: Mapping[str, Any]) -> int:
    """How many answers a request asks for. What is no prompt is the node's to refuse.

    Raises:
        InvalidRequestError: `n` is no integer.
    """
    n = body.get("n")
    # A node reads "256" and 256.0 as the number.
    if n is not None and (isinstance(n, bool) or not isinstance(n, int)):
        raise InvalidRequestError("n: must be an integer", param="n")
    prompts = _prompts(body.get("prompt")) + _prompts(body.get("prompt_embeds"))
    return max(1, prompts) * max(1, n or 1)


def _prompts(given: object) -> int:
    if given is None:
        return 0
    # A list of numbers is one prompt's tokens.
    return len(given) if isinstance(given, list) and given and not isinstance(given[0], int) else 1
