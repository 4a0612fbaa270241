"""Samples of the tiny family: each verifier's are distributed as those of the target alone."""

from collections import Counter
from collections.abc import Sequence as Several

import pytest
import torch

from specdecode import create_backend
from specdecode.backends.backend import ModelBackend, Row
from specdecode.decoding.drafters import ModelDrafter, NoDrafter
from specdecode.decoding.loop import step
from specdecode.decoding.sequence import Route, SamplingParams, Sequence
from specdecode.text import Tokenizer

NUM_SAMPLES = 20_000
LENGTH = 3
PROMPT = "The quick brown fox"
PARAMS = {"temperature": 0.9, "top_k": 12, "top_p": 0.95, "frequency_penalty": 0.5}


class Remembering:
    """Computes the logits after each sequence of tokens once; 20,000 samples have few different beginnings."""

    def __init__(self, backend: ModelBackend) -> None:
        self.name, self.vocab_size, self.max_length = backend.name, backend.vocab_size, backend.max_length
        self.eos_token_ids, self.vocabulary_id = backend.eos_token_ids, backend.vocabulary_id
        self._backend = backend
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def logits(self, rows: Several[Row]) -> torch.Tensor:
        wanted = [
            tuple(row.tokens[:end]) for row in rows for end in range(len(row.tokens) + 1 - row.num_scored, len(row.tokens) + 1)
        ]
        new = [tokens for tokens in dict.fromkeys(wanted) if tokens not in self._known]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            logits = self._backend.logits([Row(f"row {place}", list(tokens), 1) for place, tokens in enumerate(part)])
            self._known.update(zip(part, logits, strict=True))
        return torch.stack([self._known[tokens] for tokens in wanted])

    def num_remembered(self, tokens: list[int]) -> int:
        return self._backend.num_remembered(tokens)


@pytest.fixture(scope="module")
def models() -> tuple[Remembering, Remembering]:
    return Remembering(create_backend("tiny/target")), Remembering(create_backend("tiny/draft-generic"))


def sample_counts(models: tuple[Remembering, Remembering], seed: int, verifier: str | None) -> Counter[tuple[int, ...]]:
    """How often each continuation of the prompt comes; plain decoding if there is no verifier."""
    target, draft = models
    prompt = Tokenizer("tiny/target").encode(PROMPT)
    drafter = ModelDrafter(draft, eos_token_ids=target.eos_token_ids) if verifier else NoDrafter()
    counts: Counter[tuple[int, ...]] = Counter()
    for start in range(0, NUM_SAMPLES, 500):
        sequences = [
            Sequence(
                prompt,
                SamplingParams(**PARAMS, max_tokens=LENGTH, seed=seed + number, verifier=verifier or "rejection"),
                Route("draft", 2),
            )
            for number in range(start, start + 500)
        ]
        while unfinished := [sequence for sequence in sequences if sequence.finish_reason is None]:
            step(unfinished, drafter, target)
        counts.update(tuple(sequence.tokens[len(prompt) :]) for sequence in sequences)
    return counts


def chi_square(one: Counter[tuple[int, ...]], other: Counter[tuple[int, ...]]) -> tuple[float, int]:
    """The statistic of homogeneity of two samples of equal size, and its degrees of freedom; rare outcomes count as one."""
    common = [outcome for outcome in one | other if one[outcome] + other[outcome] >= 20]
    pairs = [(one[outcome], other[outcome]) for outcome in common]
    pairs.append((one.total() - sum(a for a, _ in pairs), other.total() - sum(b for _, b in pairs)))
    return sum((a - b) ** 2 / (a + b) for a, b in pairs if a + b), len(pairs) - 1


@pytest.fixture(scope="module")
def plain(models: tuple[Remembering, Remembering]) -> Counter[tuple[int, ...]]:
    return sample_counts(models, 0, None)


@pytest.mark.parametrize("verifier", ["rejection", "block", "coupled"])
def test_samples_are_distributed_as_the_targets_own(
    models: tuple[Remembering, Remembering], plain: Counter[tuple[int, ...]], verifier: str
) -> None:
    statistic, freedom = chi_square(plain, sample_counts(models, 1_000_000, verifier))
    assert freedom > 50
    # Chi-square has mean f and variance 2 f: above this bound lies less than one true sample in 100,000.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_samples_of_the_draft_are_told_from_the_targets(
    models: tuple[Remembering, Remembering], plain: Counter[tuple[int, ...]]
) -> None:
    statistic, freedom = chi_square(plain, sample_counts((models[1], models[1]), 1_000_000, None))
    assert statistic > freedom + 20 * (2 * freedom) ** 0.5
