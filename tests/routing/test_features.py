"""Features are the same alone and together, are named, and hint at the domain."""

import numpy as np
import pytest

from specdecode.evaluation.prompts import DOMAINS, load_prompts
from specdecode.routing.features import HINT_NAMES, Features, hints

TEXTS = ["def read(path):", "How many apples are left?", "", "  ", "ünïcödé 日本語 😀", "word " * 5000]


def test_alone_and_together_are_equal(encoder: str) -> None:
    together = Features(encoder, device="cpu").of(TEXTS, [3] * len(TEXTS), [False] * len(TEXTS))
    assert np.isfinite(together).all()
    for row, text in zip(together, TEXTS, strict=True):
        [alone] = Features(encoder, device="cpu").of([text], [3], [False])
        np.testing.assert_allclose(alone, row, atol=1e-5)


def test_every_number_has_a_name(encoder: str) -> None:
    features = Features(encoder, device="cpu")
    assert features.names == [f"embedding_{n}" for n in range(32)] + list(HINT_NAMES)
    assert features.of(TEXTS, [1] * len(TEXTS), [True] * len(TEXTS)).shape == (len(TEXTS), len(features.names))
    assert np.linalg.norm(features.embed(TEXTS), axis=1) == pytest.approx(1, abs=1e-5)


def test_what_is_remembered_is_not_computed_again_and_is_limited(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(encoder, device="cpu", max_remembered=3)
    computed: list[str] = []
    encode = features._encode
    monkeypatch.setattr(features, "_encode", lambda texts: computed.extend(texts) or encode(texts))
    first = features.embed(["a", "b", "a"])
    assert computed == ["a", "b"]
    np.testing.assert_array_equal(features.embed(["b", "a"]), first[[1, 0]])
    assert computed == ["a", "b"]
    features.embed(["c", "d", "e", "b"])  # more than there is room for, one of them remembered
    assert len(features._remembered) == 3
    features.embed(["a"])
    assert computed[2:] == ["c", "d", "e", "a"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_hints_tell_the_built_in_prompts_apart(domain: str) -> None:
    """Four in five by the largest score alone, which is but one of the features."""
    prompts = load_prompts(domain)
    rows = [dict(zip(HINT_NAMES, hints(p.prompt, 20, p.format == "chat"), strict=True)) for p in prompts]
    guesses = [max(DOMAINS, key=lambda name: row[f"{name}_score"]) for row in rows]
    assert guesses.count(domain) >= 0.8 * len(prompts)
    assert all(0 <= value <= 1 for row in rows for value in row.values())


def test_hints_of_shares() -> None:
    row = dict(zip(HINT_NAMES, hints("日本\n42", 3, True), strict=True))
    assert (row["foreign_share"], row["newline_share"], row["digit_share"]) == (0.4, 0.2, 0.4)
    assert row["prompt_length"] == 2 / 16
    assert row["is_chat"] == 1
