"""Texts in, prompts like none of them out: on these a router learns what it must not expect of a draft.

A network that has seen only its domains is as sure elsewhere; examples from elsewhere teach it not to be (outlier exposure,
Hendrycks et al. 2018). Knows nothing of drafts or routers.
"""

from collections.abc import Callable
from collections.abc import Sequence as Several

import numpy as np

_ALPHABETS = (
    "äöüßéèêàçñíóúâîôëïœ",
    "абвгдежзиклмнопрстуфхцчшщыэюя",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "アイウエオカキクケコサシスセソタチツテト",
    "的一是不了人我在有他这中大来上国",
)
_MAX_LENGTH = 6000  # characters


def outlier(texts: Several[str], rng: np.random.Generator) -> str:
    """Makes a prompt that is next to nothing, of two kinds at once, in other letters, the same again and again, or very long.

    Args:
        texts: at least one, none of them empty.
        rng: decides which, and of what.
    """
    make: Callable[[Several[str], np.random.Generator], str] = _KINDS[rng.integers(len(_KINDS))]
    return make(texts, rng)


def _one(texts: Several[str], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]


def _fragment(texts: Several[str], rng: np.random.Generator) -> str:
    """The first characters of a text, or one of its words."""
    text = _one(texts, rng).strip()
    words = text.split()
    return text[: rng.integers(1, 9)] if rng.random() < 0.5 or not words else words[rng.integers(len(words))]


def _both(texts: Several[str], rng: np.random.Generator) -> str:
    """The end of one text after the beginning of another."""
    first, second = _one(texts, rng), _one(texts, rng)
    return (
        first[: 1 + int(len(first) * rng.uniform(0.3, 1))]
        + "\n" * rng.integers(3)
        + second[int(len(second) * rng.uniform(0, 0.7)) :]
    )


def _foreign(texts: Several[str], rng: np.random.Generator) -> str:
    """A text whose letters, or some of them, are those of another alphabet."""
    alphabet = _ALPHABETS[rng.integers(len(_ALPHABETS))]
    share, shift = rng.uniform(0.1, 1), rng.integers(len(alphabet))
    mapping: dict[str, str | int | None] = {
        letter: alphabet[(place + shift) % len(alphabet)]
        for place, letter in enumerate("etaoinshrdlucmfwypvbgkjqxz")  # by frequency
        if rng.random() < share
    }
    return _one(texts, rng).lower().translate(str.maketrans(mapping))[: rng.integers(20, 200)]


def _repeated(texts: Several[str], rng: np.random.Generator) -> str:
    """A word or a line many times."""
    text = _one(texts, rng)
    pieces = [piece for piece in (text.split() if rng.random() < 0.5 else text.splitlines()) if piece.strip()] or [text]
    piece = pieces[rng.integers(len(pieces))]
    counted = rng.random() < 0.3
    lines = [f"{number}: {piece}" if counted else piece for number in range(rng.integers(20, 200))]
    return (" " if rng.random() < 0.5 else "\n").join(lines)[:_MAX_LENGTH]


def _long(texts: Several[str], rng: np.random.Generator) -> str:
    """Many texts, one after the other."""
    limit, text = rng.integers(_MAX_LENGTH // 6, _MAX_LENGTH), ""
    while len(text) < limit:
        text += _one(texts, rng) + "\n\n"
    return text[:limit]


_KINDS = (_fragment, _both, _foreign, _repeated, _long)
