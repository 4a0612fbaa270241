"""The output's distribution is the target's, added up exactly."""

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch

from specdecode.backends.table import TableModel, random_table
from specdecode.decoding.drafters import ModelDrafter
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.decoding.verification import Block, BlockVerifier, RejectionVerifier, accept
from tests.decoding.enumeration import emitted_law, expected_accepted, largest_difference, target_law

VERIFIERS = [RejectionVerifier(), BlockVerifier()]
SAMPLING = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.0, top_k=2),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=0.7, top_k=3, top_p=0.6),
    SamplingParams(temperature=0.0),
]


@cache
def table(vocab_size: int, seed: int) -> TableModel:
    return TableModel(cache(random_table(vocab_size, seed, order=2, sharpness=1.5)))


def emitted_and_target_law(verifier, params, k, *, vocab_size=3, seed=0, support=64):
    target, draft = table(vocab_size, 2 * seed), table(vocab_size, 2 * seed + 1)
    width = min(support, vocab_size) if params.temperature else 1
    drafter = ModelDrafter(draft, support=support)
    emitted = emitted_law(target, drafter, verifier, prompt=[0, 1], params=params, k=k, support=width, length=3)
    return emitted, target_law(target, prompt=[0, 1], params=params, length=3)


@pytest.mark.parametrize("params", SAMPLING, ids=lambda params: f"T{params.temperature}-k{params.top_k}-p{params.top_p}")
@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("verifier", VERIFIERS, ids=lambda verifier: type(verifier).__name__)
def test_the_emitted_law_is_the_targets(verifier, k, params):
    params = replace(params, max_tokens=100)
    for vocab_size, seed, support in [(3, 0, 64), (3, 1, 64), (4, 2, 64), (3, 3, 2), (4, 4, 2), (4, 5, 1)]:
        emitted, expected = emitted_and_target_law(verifier, params, k, vocab_size=vocab_size, seed=seed, support=support)
        assert len(expected) == vocab_size**3
        assert largest_difference(emitted, expected) < 1e-9


class ResamplesFromTarget(RejectionVerifier):
    def emission(self, block, lengths):
        return block.p_after(lengths)


class AcceptsByTargetAlone(RejectionVerifier):
    def reach(self, block):
        return block.p_drafted().cumprod(-1)


class AcceptsEverything(RejectionVerifier):
    def reach(self, block):
        return torch.ones_like(block.q_drafted())


class ForgetsEarlierRejections(RejectionVerifier):
    def reach(self, block):
        return (block.p_drafted() / block.q_drafted()).clamp(max=1).cummin(-1).values


class BelievesAFlatterQ(RejectionVerifier):
    def reach(self, block):
        return super().reach(_flatter(block))

    def emission(self, block, lengths):
        return super().emission(_flatter(block), lengths)


def _flatter(block):
    return replace(block, q=0.9 * block.q + 0.1 / block.q.shape[2])


@pytest.mark.parametrize(
    ("verifier", "k"),
    [
        (ResamplesFromTarget(), 1),
        (AcceptsByTargetAlone(), 1),
        (AcceptsEverything(), 1),
        (ForgetsEarlierRejections(), 2),
        (BelievesAFlatterQ(), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_wrong_verifier_is_caught(verifier, k):
    emitted, expected = emitted_and_target_law(verifier, SamplingParams(temperature=1.0), k)
    assert sum(emitted.values()) == pytest.approx(1)
    assert largest_difference(emitted, expected) > 1e-3


def random_draft(k, *, vocab_size=5, seed=0):
    """A draft beside the target's distributions at its positions, [k + 1, vocab]."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(k, 3, generator=generator, dtype=torch.float64)
    support = (
        torch.stack([torch.randperm(vocab_size, generator=generator)[:3] for _ in range(k)]) if k else torch.empty(0, 3).long()
    )
    p = torch.rand(k + 1, vocab_size, generator=generator, dtype=torch.float64)
    draft = Draft(support[:, 1].tolist(), support, q / q.sum(-1, keepdim=True))
    return draft, p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("verifier", VERIFIERS, ids=lambda verifier: type(verifier).__name__)
def test_the_law_of_a_ragged_batch_is_that_of_each_draft_alone(verifier):
    pairs = [random_draft(k, seed=k) for k in (2, 0, 4, 1)]
    batch = Block.of([draft for draft, _ in pairs], torch.cat([p for _, p in pairs]))
    for index, (draft, p) in enumerate(pairs):
        k, alone = len(draft.tokens), Block.of([draft], p)
        torch.testing.assert_close(verifier.reach(batch)[index, :k], verifier.reach(alone)[0])
        assert verifier.reach(batch)[index, k:].eq(0).all()
        for length in range(k + 1):
            lengths = torch.tensor([min(length, len(other.tokens)) for other, _ in pairs])
            emission = verifier.emission(batch, lengths)[index]
            torch.testing.assert_close(emission, verifier.emission(alone, torch.tensor([length]))[0])


def test_block_verification_accepts_no_less_than_rejection_and_sometimes_more():
    gains = []
    for seed in range(8):
        target, drafter = table(4, 2 * seed), ModelDrafter(table(4, 2 * seed + 1))
        sequence = Sequence([0, 1], SamplingParams(temperature=1.0), Route("draft", 3))
        rejection, block = (
            expected_accepted(target, drafter, verifier, sequence, 4) for verifier in (RejectionVerifier(), BlockVerifier())
        )
        gains.append(block - rejection)
    assert min(gains) > -1e-12
    assert max(gains) > 0.01


@pytest.mark.parametrize("verifier", VERIFIERS, ids=lambda verifier: type(verifier).__name__)
def test_accept_draws_from_the_law(verifier):
    num_draws, (draft, p) = 20_000, random_draft(3)
    block = Block.of([draft] * num_draws, p.repeat(num_draws, 1))
    sequences = [Sequence([0] * (1 + seed % 7), SamplingParams(seed=seed), Route("draft", 3)) for seed in range(num_draws)]
    counts = Counter(zip(*accept(verifier, block, sequences), strict=True))
    reach = [1.0, *verifier.reach(block)[0].tolist(), 0.0]
    for length in range(4):
        emission = verifier.emission(block, torch.full((num_draws,), length))[0]
        for token, share in enumerate((emission / emission.sum()).tolist()):
            chance = (reach[length] - reach[length + 1]) * share
            # Five standard deviations: with the 20 outcomes, true draws would fail for one seed in 80,000.
            bound = 5 * (chance * (1 - chance) / num_draws) ** 0.5
            assert abs(counts[length, token] / num_draws - chance) <= bound
