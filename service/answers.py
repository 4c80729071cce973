"""When an answer counts as right: normalised exact match, and the model stopped by itself.

One definition for the worker's evaluation, the node's verification and the demo.
"""

from service.schemas import normalise_text

STOP = "stop"
"""OpenAI's ``finish_reason`` of an answer that the model ended by itself."""


def matches(answer: str, target: str, *, finished: bool) -> bool:
    """Whether the answer is the whole target and nothing but it, ended by the model's own end-of-sequence token."""
    return finished and normalise_text(answer) == normalise_text(target)
