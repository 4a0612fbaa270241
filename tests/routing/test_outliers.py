"""Outliers are of every kind, within bounds, the same for a seed, and unlike what they were made of."""

import numpy as np
import pytest

from specdecode.routing import outliers
from specdecode.routing.outliers import outlier

TEXTS = [
    "def read(path):\n    return open(path).read()\n",
    "Can I get a coffee to go, please?",
    "Tom has 12 pens and buys 3 more.",
    "x",
]


def made(seed: int, count: int = 300) -> list[str]:
    rng = np.random.default_rng(seed)
    return [outlier(TEXTS, rng) for _ in range(count)]


def test_a_seed_gives_the_same_ones_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    kinds = outliers._KINDS
    monkeypatch.setattr(
        outliers, "_KINDS", tuple(lambda *args, kind=kind: asked.append(kind.__name__) or kind(*args) for kind in kinds)
    )
    texts = made(1)
    assert set(asked) == {kind.__name__ for kind in kinds}
    assert texts == made(1) != made(2)
    assert all(0 < len(text) <= 6000 for text in texts)
    assert len(set(texts) - set(TEXTS)) > 0.6 * len(set(texts))


def test_each_kind_is_what_it_says() -> None:
    rng = np.random.default_rng(0)
    words = {word for text in TEXTS for word in text.split()}
    for _ in range(50):
        fragment = outliers._fragment(TEXTS, rng)
        assert fragment in words or (len(fragment) <= 8 and any(text.startswith(fragment) for text in TEXTS))
        both = outliers._both(TEXTS, rng)
        assert any(both.startswith(text[:1]) for text in TEXTS)
        assert any(both.endswith(text[-1:]) for text in TEXTS)
        repeated = outliers._repeated(TEXTS, rng)
        assert len(repeated.replace("\n", " ").split()) >= 20
        assert 900 < len(outliers._long(TEXTS, rng)) < 6000
    foreign = "".join(outliers._foreign(TEXTS, rng) for _ in range(50))
    assert 0.2 < sum(not letter.isascii() for letter in foreign) / len(foreign) < 0.9
