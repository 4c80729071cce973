"""When an answer counts as right: normalised exact match, and the model stopped by itself."""

import unicodedata

STOP = "stop"


def normalise_answer(text: str) -> str:
    """NFKC, casefolded, runs of white space as one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def matches(answer: str, target: str, finish_reason: str) -> bool:
    """Whether the answer is the whole target and nothing but it, ended by the model's own end-of-sequence token."""
    return finish_reason == STOP and normalise_answer(answer) == normalise_answer(target)
