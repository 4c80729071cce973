"""The digest under which secrets, idempotency keys and prompts are kept in Redis."""

import hashlib


def sha256_of(content: str | bytes) -> str:
    """SHA-256 in hex; of a text, that of its UTF-8."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
