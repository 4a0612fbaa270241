"""Probabilities equal a slow and obvious reference; draws follow them; random numbers are a function."""

import random
from itertools import pairwise
from math import exp, nextafter

import pytest
import torch

from specdecode.decoding.sampling import Purpose, probabilities, sample, sparsify, uniforms
from specdecode.decoding.sequence import SamplingParams

LAST = 1 - 2.0**-53  # the largest number below 1


def reference(logits: list[float], params: SamplingParams) -> list[float]:
    """One row, token by token."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if params.temperature == 0:
        return [float(token == ranked[0]) for token in range(len(logits))]
    ranked = ranked[: params.top_k or None]
    weights = {token: exp((logits[token] - logits[ranked[0]]) / params.temperature) for token in ranked}
    kept, cumulative = [], 0.0
    for token in ranked:
        if not kept or cumulative < params.top_p:
            kept.append(token)
        cumulative += weights[token] / sum(weights.values())
    return [weights[token] / sum(weights[t] for t in kept) if token in kept else 0.0 for token in range(len(logits))]


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 2.0]),
        top_k=rng.choice([0, 0, 1, 2, 5, 12, 100]),
        top_p=rng.choice([1.0, 1.0, 0.05, 0.5, 0.9, 0.99]),
    )


def random_rows(seed: int, num_rows: int = 40, vocab_size: int = 12) -> tuple[torch.Tensor, list[SamplingParams]]:
    rng = random.Random(seed)
    logits = 2 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits, [random_params(rng) for _ in range(num_rows)]


@pytest.mark.parametrize("seed", range(5))
def test_a_mixed_batch_equals_the_reference_row_by_row(seed):
    logits, params = random_rows(seed)
    expected = torch.tensor([reference(row, row_params) for row, row_params in zip(logits.tolist(), params, strict=True)])
    torch.testing.assert_close(probabilities(logits, params), expected.double(), atol=1e-6, rtol=0)
    assert (probabilities(logits, params).count_nonzero(-1) == expected.count_nonzero(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mixed_batch_equals_its_rows_alone(dtype):
    logits, params = random_rows(7)
    together = probabilities(logits.to(dtype), params)
    alone = [probabilities(row[None], [row_params]) for row, row_params in zip(logits.to(dtype), params, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=0)


def test_a_neighbour_with_top_p_takes_no_unlikely_token_from_a_row_without():
    logits = torch.tensor([[20.0, 0.0, 0.0], [20.0, 0.0, 0.0]])
    plain, nucleus = SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.5)
    together, alone = probabilities(logits, [plain, nucleus])[:1], probabilities(logits[:1], [plain])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_top_p_is_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    sizes = {0.01: 1, 0.49: 1, 0.51: 2, 0.74: 2, 0.76: 3, 0.87: 3, 0.88: 4, 1.0: 4}
    for top_p, size in sizes.items():
        assert probabilities(logits, [SamplingParams(temperature=1.0, top_p=top_p)]).count_nonzero() == size


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert probabilities(logits, [SamplingParams()] * 2).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_float64_is_kept_and_bfloat16_is_promoted():
    logits, params = random_rows(3)
    assert probabilities(logits, params).dtype == torch.float64
    rounded = probabilities(logits.bfloat16(), params)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, probabilities(logits.bfloat16().float(), params))
    torch.testing.assert_close(rounded.sum(-1), torch.ones(len(params)))


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6, 1e30])
def test_extreme_temperatures_give_a_distribution(temperature):
    logits = torch.tensor([[-30.0, 0.0, 25.0, 20.0]])
    p = probabilities(logits, [SamplingParams(temperature=temperature)])
    assert p.sum() == pytest.approx(1)
    assert p.argmax() == 2 or temperature > 1


@pytest.mark.parametrize("scale", [1.0, 4.0, 2.0**-30])
def test_each_index_owns_exactly_its_share(scale):
    weights = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.125, 0.125, 0.0], dtype=torch.float64) * scale
    owners = [(0.0, 1), (0.25, 3), (0.75, 4), (0.875, 5), (1.0, None)]
    for (start, index), (end, _) in pairwise(owners):
        inside = torch.tensor([start, nextafter(start, 1), (start + end) / 2, nextafter(end, 0)], dtype=torch.float64)
        assert sample(weights.expand(4, -1), inside).tolist() == [index] * 4


def test_random_weights_are_drawn_by_their_cumulative_shares():
    weights = torch.rand(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[torch.rand(50, 9, generator=torch.Generator().manual_seed(1)) < 0.3] = 0
    ends = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    for row, row_ends in zip(weights, ends, strict=True):
        for index in row.nonzero().flatten().tolist():
            start = row_ends[index - 1].item() if index else 0.0
            u = torch.tensor([start + 1e-12, row_ends[index].item() - 1e-12], dtype=torch.float64)
            assert sample(row.expand(2, -1), u).tolist() == [index] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("u", [0.0, LAST])
def test_a_token_of_weight_zero_is_never_drawn(dtype, u):
    weights = torch.tensor([[0, 1, 0], [0, 1e-30, 0], [1, 1e-17, 0], [0, 0.1, 0.7]], dtype=dtype)
    drawn = sample(weights, torch.full((4,), u, dtype=torch.float64))
    assert (weights.gather(1, drawn[:, None]) > 0).all()


def test_sparsify_keeps_the_most_likely_tokens_in_proportion():
    logits, _ = random_rows(5)
    probs = logits.softmax(-1)
    support, q = sparsify(probs, 4)
    kept = probs.gather(1, support)
    torch.testing.assert_close(q, kept / kept.sum(-1, keepdim=True))
    assert (kept.min(-1).values >= probs.scatter(1, support, 0.0).max(-1).values).all()


def test_a_uniform_depends_on_its_arguments_and_nothing_else():
    seeds, positions = [3, 2**64 - 1, 3, 0], [7, 7, 8, 100_000]
    batch = uniforms(seeds, positions, Purpose.DRAFT, 5)
    for _ in range(2):
        alone = [uniforms([seed], [place], Purpose.DRAFT, 3) for seed, place in zip(seeds, positions, strict=True)]
        assert torch.equal(batch[:, :3], torch.cat(alone))


def test_uniforms_differ_in_every_argument():
    numbers = torch.cat(
        [uniforms([seed] * 50, range(50), purpose, 8).flatten() for seed in (0, 1, 2**63) for purpose in Purpose]
    )
    assert len(numbers.unique()) == len(numbers) == 3 * len(Purpose) * 400


def test_uniforms_are_uniform_and_independent():
    n = 20_000
    draft, length, token = (uniforms([11] * (n // 4), range(n // 4), purpose, 4).flatten() for purpose in Purpose)
    offsets = uniforms([11] * n, range(n), Purpose.DRAFT, 2)
    # Five standard deviations: a correlation's is 1 / sqrt(n), a bin's count's below sqrt(n / 16).
    for numbers in (draft, length, token):
        assert ((numbers >= 0) & (numbers < 1)).all()
        assert (torch.histc(numbers, 16, 0, 1) - n / 16).abs().max() < 5 * (n / 16) ** 0.5
    for one, other in [(draft, length), (draft, token), (length, token), offsets.T, (draft[:-4], draft[4:])]:
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 5 / n**0.5
