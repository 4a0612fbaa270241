"""A text in, a number in [0, 1) out, as good as random and always the same: which of many fall into a share."""

import hashlib


def chance(text: str) -> float:
    """The first 64 bits of the text's digest, as a fraction."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
