"""Draws follow their weights; random numbers are a function of what they are named by."""

from itertools import pairwise
from math import nextafter

import pytest
import torch

from specdecode.decoding.sampling import Purpose, gumbel_noise, largest, sample, shared_choice, uniforms
from specdecode.errors import ModelError

LAST = 1 - 2.0**-53  # the largest number below 1


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


@pytest.mark.parametrize("size", [256, 257, 1_000, 4_096])
def test_a_long_row_is_drawn_from_as_a_short_one(size):
    weights = torch.rand(64, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    weights[:, ::3] = 0
    u = torch.linspace(0, LAST, 64, dtype=torch.float64)
    cumulative = weights.cumsum(-1)
    expected = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(-1).clamp(max=size - 1)
    drawn = sample(weights, u)
    assert torch.equal(drawn[:-1], expected[:-1])
    assert (weights.gather(1, drawn[:, None]) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("u", [0.0, LAST])
def test_a_token_of_weight_zero_is_never_drawn(dtype, u):
    weights = torch.tensor([[0, 1, 0], [0, 1e-30, 0], [1, 1e-17, 0], [0, 0.1, 0.7]], dtype=dtype)
    drawn = sample(weights, torch.full((4,), u, dtype=torch.float64))
    assert (weights.gather(1, drawn[:, None]) > 0).all()


@pytest.mark.parametrize("vocab_size", [7, 64, 1_000, 20_001])
@pytest.mark.parametrize("size", [1, 3, 40])
def test_the_largest_values_are_those_of_topk(vocab_size, size):
    values = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(size))
    values[1, : vocab_size // 2] = -torch.inf
    found, places = largest(values, min(size, vocab_size))
    assert torch.equal(found, values.topk(min(size, vocab_size)).values)
    assert torch.equal(values.gather(1, places), found)


@pytest.mark.parametrize("weights", [[[0.0, 0.0]], [[torch.nan, 1.0]], [[torch.inf, 1.0]], [[0.0] * 600]])
def test_weights_without_a_positive_finite_sum_are_an_error(weights):
    with pytest.raises(ModelError, match="not finite"):
        sample(torch.tensor(weights), torch.tensor([0.5]))


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
    draft, length, token = (
        uniforms([11] * (n // 4), range(n // 4), purpose, 4).flatten()
        for purpose in (Purpose.DRAFT, Purpose.LENGTH, Purpose.TOKEN)
    )
    offsets = uniforms([11] * n, range(n), Purpose.DRAFT, 2)
    # Five standard deviations: a correlation's is 1 / sqrt(n), a bin's count's below sqrt(n / 16).
    for numbers in (draft, length, token):
        assert ((numbers >= 0) & (numbers < 1)).all()
        assert (torch.histc(numbers, 16, 0, 1) - n / 16).abs().max() < 5 * (n / 16) ** 0.5
    for one, other in [(draft, length), (draft, token), (length, token), offsets.T, (draft[:-4], draft[4:])]:
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 5 / n**0.5


def test_noise_depends_on_seed_position_and_token_and_nothing_else():
    tokens = torch.tensor([[5, 0, 7], [7, 7, 151_000], [0, 1, 2]])
    together = gumbel_noise([3, 3, 2**64 - 1], [9, 10, 9], tokens)
    assert len(together.unique()) == 8  # of which one is for token 7 at position 10, twice
    assert torch.equal(gumbel_noise([3], [9], torch.tensor([[7, 5]]))[0], together[0, [2, 0]])


def test_noise_is_gumbel_and_independent():
    # Five standard deviations each; the mean is Euler's constant, the variance pi squared over 6.
    n = 40_000
    noise = gumbel_noise([1] * n, range(n), torch.arange(4).expand(n, -1))
    assert (noise.mean(0) - 0.57721566).abs().max() < 5 * (1.6449 / n) ** 0.5
    assert (noise.var(0) - 1.6449).abs().max() < 5 * 1.6449 * (4.4 / n) ** 0.5
    u = (-(-noise).exp()).exp()
    assert (torch.histc(u, 64, 0, 1) - 4 * n / 64).abs().max() < 5 * (4 * n / 64) ** 0.5
    pairs = [
        *pairwise(noise.T),
        (noise[:-1, 0], noise[1:, 0]),
        (noise[:, 0], gumbel_noise([2] * n, range(n), noise[:, :1].long() * 0)[:, 0]),
    ]
    for one, other in pairs:
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 5 / n**0.5


@pytest.mark.parametrize("vocab_size", [5, 700])
def test_the_shared_choice_is_distributed_as_p(vocab_size):
    n, generator = 60_000, torch.Generator().manual_seed(vocab_size)
    log_p = (2 * torch.randn(vocab_size, generator=generator, dtype=torch.float64)).log_softmax(-1)
    log_p[2] = -torch.inf
    ids = torch.arange(vocab_size)
    tokens = torch.cat(
        [
            shared_choice(log_p.expand(6_000, -1), ids.expand(6_000, -1), [7] * 6_000, range(i, i + 6_000))
            for i in range(0, n, 6_000)
        ]
    )
    counts = torch.bincount(tokens, minlength=vocab_size)
    p = log_p.softmax(-1)
    assert counts[2] == 0
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_two_choices_with_one_noise_are_equal_as_often_as_the_paper_says():
    n = 20_000
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]).double().log(), torch.tensor([0.25, 0.25, 0.25, 0.25]).double().log()
    ids = torch.arange(4).expand(n, -1)
    one, other = (shared_choice(log_p.expand(n, -1), ids, [1] * n, range(n)) for log_p in (p, q))
    distance = 0.5 * (p.exp() - q.exp()).abs().sum().item()
    bound = (1 - distance) / (1 + distance)
    assert (one == other).double().mean() > bound - 5 * (bound * (1 - bound) / n) ** 0.5
    reversed_order = shared_choice(p.flip(0).expand(n, -1), ids.flip(1), [1] * n, range(n))
    assert torch.equal(reversed_order, one)
