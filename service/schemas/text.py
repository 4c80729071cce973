"""Texts on the wire: what they may contain, and when two of them are the same."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

MAX_TEXT_CHARS = 32_768

# Cc is every control character; line feed and tab are text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def normalise_text(text: str) -> str:
    """The form in which prompts, or answers, are compared: NFKC, casefolded, runs of white space as one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def check_untrained(rephrases: Sequence[str], trained: Iterable[str]) -> None:
    """Raises ValueError for a rephrase that is trained on: it would measure what was learned by heart."""
    known = {normalise_text(text) for text in trained}
    for index, rephrase in enumerate(rephrases):
        if normalise_text(rephrase) in known:
            raise ValueError(f"rephrases[{index}] is trained on as well; rephrases are kept for measuring")


def _no_control(text: str) -> str:
    if found := _CONTROL.search(text):
        raise ValueError(f"control character U+{ord(found.group()):04X} at position {found.start()}")
    return text


def _clean_text(text: str) -> str:
    if not (stripped := _no_control(text).strip()):
        raise ValueError("must not be empty or only white space")
    return stripped


Text = Annotated[
    str, StringConstraints(strict=True, min_length=1, max_length=MAX_TEXT_CHARS), AfterValidator(_clean_text)
]
MetadataKey = Annotated[str, StringConstraints(strict=True, min_length=1, max_length=64), AfterValidator(_clean_text)]
MetadataValue = Annotated[str, StringConstraints(strict=True, max_length=512), AfterValidator(_no_control)]
