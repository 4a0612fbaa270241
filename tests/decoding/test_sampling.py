"""Log-probabilities equal a slow and obvious reference; draws follow them; random numbers are a function."""

import random
from collections import Counter
from itertools import pairwise
from math import exp, inf, nextafter

import pytest
import torch

from specdecode.decoding.constraints import Scored
from specdecode.decoding.sampling import (
    Purpose,
    gumbel_noise,
    largest,
    log_probabilities,
    sample,
    shared_choice,
    sparsify,
    uniforms,
)
from specdecode.decoding.sequence import SamplingParams, Sequence
from specdecode.errors import ModelError

LAST = 1 - 2.0**-53  # the largest number below 1
EOS = frozenset({11})


def reference(logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """One row, token by token."""
    counts, text = Counter(output), prompt + output
    values = []
    for token, logit in enumerate(logits):
        value = logit + params.logit_bias.get(token, 0.0)
        if token in text:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * counts[token] + params.presence_penalty * (counts[token] > 0)
        ends_bad_word = any(text[len(text) - len(word) + 1 :] + [token] == list(word) for word in params.bad_words_ids)
        is_early_end = len(output) < params.min_tokens and token in params.end_token_ids(EOS)
        is_allowed = params.allowed_token_ids is None or token in params.allowed_token_ids
        values.append(-inf if ends_bad_word or is_early_end or not is_allowed else value)
    ranked = sorted(range(len(values)), key=lambda token: (-values[token], token))
    if params.temperature == 0:
        return [float(token == ranked[0]) for token in range(len(values))]
    weights = {token: exp((values[token] - values[ranked[0]]) / params.temperature) for token in ranked}
    ranked = [token for token in ranked if weights[token] >= params.min_p and weights[token] > 0][: params.top_k or None]
    total = sum(weights[token] for token in ranked)
    kept, cumulative = [], 0.0
    for token in ranked:
        if not kept or cumulative < params.top_p or params.top_p == 1:
            kept.append(token)
        cumulative += weights[token] / total
    return [weights[token] / sum(weights[t] for t in kept) if token in kept else 0.0 for token in range(len(values))]


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 2.0]),
        top_k=rng.choice([0, 0, 1, 2, 5, 12, 100]),
        top_p=rng.choice([1.0, 1.0, 0.05, 0.5, 0.9, 0.99]),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.3, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.0, 0.7, 1.3]),
        presence_penalty=rng.choice([0.0, 0.0, -1.0, 2.0]),
        frequency_penalty=rng.choice([0.0, 0.0, -0.5, 0.9]),
        logit_bias=rng.choice([{}, {}, {3: 2.5}, {0: -100.0, 7: 1.0}]),
        allowed_token_ids=rng.choice([None, None, frozenset({0, 2, 3, 5, 11}), frozenset(range(4, 12))]),
        bad_words_ids=rng.choice([(), (), ((5,),), ((1, 2), (4, 4, 6))]),
        min_tokens=rng.choice([0, 0, 3, 6]),
        stop_token_ids=rng.choice([frozenset(), frozenset({2})]),
    )


def random_scored(seed: int, num_sequences: int = 30, vocab_size: int = 12) -> tuple[torch.Tensor, list[Scored]]:
    """Logits, [sum(num_scored), vocab], of sequences with a prompt, an output and drafted tokens."""
    rng = random.Random(seed)
    scored = []
    for _ in range(num_sequences):
        tokens = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 12))]
        drafted = [rng.randrange(vocab_size) for _ in range(rng.randint(0, 4))]
        sequence = Sequence(tokens, random_params(rng), num_prompt_tokens=rng.randint(1, len(tokens)))
        scored.append(Scored(sequence, drafted, rng.randint(1, len(drafted) + 1)))
    num_rows = sum(part.num_scored for part in scored)
    return 2 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), scored


def probabilities(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """One row for each of some parameters, after a prompt of one token."""
    return log_probabilities(logits.clone(), [Scored(Sequence([0], row), [], 1) for row in params], EOS).exp()


@pytest.mark.parametrize("seed", range(8))
def test_a_mixed_batch_equals_the_reference_row_by_row(seed):
    logits, scored = random_scored(seed)
    expected = []
    for row, (part, position) in zip(
        logits.tolist(), [(part, position) for part in scored for position in part.positions], strict=True
    ):
        start = part.sequence.num_prompt_tokens
        expected.append(reference(row, part.sequence.params, part.tokens[:start], part.tokens[start:position]))
    p = log_probabilities(logits.clone(), scored, EOS).exp()
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(p, expected, atol=1e-9, rtol=0)
    assert torch.equal(p > 0, expected > 0)


def test_it_is_done_in_place_where_nothing_is_converted():
    logits, scored = random_scored(1)
    assert log_probabilities(logits, scored, EOS).data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mixed_batch_equals_its_rows_alone(dtype):
    logits, scored = random_scored(7)
    logits = logits.to(dtype)
    together = log_probabilities(logits.clone(), scored, EOS)
    rows = logits.split([part.num_scored for part in scored])
    alone = [log_probabilities(part_rows.clone(), [part], EOS) for part_rows, part in zip(rows, scored, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=0)


def test_a_sequence_that_grows_is_counted_as_one_that_was_long_from_the_start():
    rng = random.Random(0)
    params = SamplingParams(temperature=1.0, repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.4)
    growing = Sequence([3, 1, 3], params)
    for _ in range(12):
        growing.tokens.extend(rng.randrange(12) for _ in range(rng.randint(1, 4)))
        fresh = Sequence(growing.tokens, params, num_prompt_tokens=3)
        logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(len(growing.tokens)), dtype=torch.float64)
        one, other = (log_probabilities(logits.clone(), [Scored(s, [5, 5], 3)], EOS) for s in (growing, fresh))
        assert torch.equal(one, other)


def test_a_vocabulary_that_lacks_some_of_the_tokens_passes_them_over():
    params = SamplingParams(
        temperature=1.0, logit_bias={9: 5.0}, bad_words_ids=((8,),), allowed_token_ids=frozenset({1, 2, 9}), frequency_penalty=1.0
    )
    log_p = log_probabilities(torch.zeros(1, 5), [Scored(Sequence([1, 9], params), [9], 1)], EOS)
    torch.testing.assert_close(log_p.exp(), torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.0]]))
    nothing = SamplingParams(allowed_token_ids=frozenset({9}))
    for temperature in (0.0, 1.0):
        row = Scored(Sequence([1], SamplingParams(temperature=temperature, allowed_token_ids=frozenset({9}))), [], 1)
        assert log_probabilities(torch.zeros(1, 5), [row], EOS).isneginf().all()
    assert nothing.allowed_token_ids == {9}


def test_a_neighbour_with_top_p_takes_no_unlikely_token_from_a_row_without():
    logits = torch.tensor([[20.0, 0.0, 0.0], [20.0, 0.0, 0.0]])
    plain, nucleus = SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.5)
    together, alone = probabilities(logits, [plain, nucleus])[:1], probabilities(logits[:1], [plain])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_top_p_is_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64).log()
    sizes = {0.01: 1, 0.49: 1, 0.51: 2, 0.74: 2, 0.76: 3, 0.89: 3, 0.91: 4, 1.0: 4}
    for top_p, size in sizes.items():
        assert probabilities(logits, [SamplingParams(temperature=1.0, top_p=top_p)]).count_nonzero() == size


@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.5}, {"top_k": 3, "top_p": 0.6}])
def test_equals_of_the_last_token_that_is_kept_are_kept_too(params):
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]]).log()
    expected = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    torch.testing.assert_close(probabilities(logits, [SamplingParams(temperature=1.0, **params)]), expected)


@pytest.mark.parametrize("size", [300, 5_000, 40_000])
@pytest.mark.parametrize("sharpness", [0.0, 0.5, 2.0, 8.0])
def test_a_large_vocabulary_is_cut_as_if_it_were_sorted(size, sharpness):
    logits = sharpness * torch.randn(3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    logits += 1e-9 * torch.arange(size)  # no equals
    for params in [{"top_p": 0.95}, {"top_k": 200}, {"top_k": 700, "top_p": 0.9}, {"min_p": 0.01, "top_p": 0.8}, {"top_p": 0.3}]:
        ordered, order = (logits / 0.9).softmax(-1).sort(-1, descending=True)
        kept = ordered >= params.get("min_p", 0.0) * ordered[:, :1]
        kept &= torch.arange(size) < params.get("top_k", size)
        ordered = torch.where(kept, ordered, 0.0)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        ordered = torch.where(ordered.cumsum(-1) - ordered < params.get("top_p", 2.0), ordered, 0.0)
        expected = torch.zeros_like(logits).scatter(1, order, ordered / ordered.sum(-1, keepdim=True))
        found = probabilities(logits, [SamplingParams(temperature=0.9, **params)] * 3)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("vocab_size", [7, 64, 1_000, 20_001])
@pytest.mark.parametrize("size", [1, 3, 40])
def test_the_largest_values_are_those_of_topk(vocab_size, size):
    values = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(size))
    values[1, : vocab_size // 2] = -torch.inf
    found, places = largest(values, min(size, vocab_size))
    assert torch.equal(found, values.topk(min(size, vocab_size)).values)
    assert torch.equal(values.gather(1, places), found)


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert probabilities(logits, [SamplingParams()] * 2).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_float64_is_kept_and_bfloat16_is_promoted():
    logits, scored = random_scored(3)
    assert log_probabilities(logits.clone(), scored, EOS).dtype == torch.float64
    rounded = log_probabilities(logits.bfloat16(), scored, EOS)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, log_probabilities(logits.bfloat16().float(), scored, EOS))
    torch.testing.assert_close(rounded.exp().sum(-1), torch.ones(len(rounded)))


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6, 1e30])
def test_extreme_temperatures_give_a_distribution(temperature):
    logits = torch.tensor([[-30.0, 0.0, 25.0, 20.0]])
    p = probabilities(logits, [SamplingParams(temperature=temperature)])
    assert p.sum() == pytest.approx(1)
    assert p.argmax() == 2 or temperature > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error_and_no_token(temperature, wrong):
    p = probabilities(torch.tensor([[1.0, wrong, 0.0]]), [SamplingParams(temperature=temperature)])
    with pytest.raises(ModelError, match="not finite"):
        sample(p, torch.tensor([0.5]))


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


def test_sparsify_keeps_the_most_likely_tokens_in_proportion():
    probs = torch.rand(40, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    support, q = sparsify(probs.log(), 4)
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
    pairs = [*pairwise(noise.T), (noise[:-1, 0], noise[1:, 0]), (noise[:, 0], gumbel_noise([2] * n, range(n), noise[:, :1].long() * 0)[:, 0])]
    for one, other in pairs:
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 5 / n**0.5


@pytest.mark.parametrize("vocab_size", [5, 700])
def test_the_shared_choice_is_distributed_as_p(vocab_size):
    n, generator = 60_000, torch.Generator().manual_seed(vocab_size)
    log_p = (2 * torch.randn(vocab_size, generator=generator, dtype=torch.float64)).log_softmax(-1)
    log_p[2] = -torch.inf
    tokens = torch.cat([shared_choice(log_p.expand(6_000, -1), [7] * 6_000, range(i, i + 6_000)) for i in range(0, n, 6_000)])
    counts = torch.bincount(tokens, minlength=vocab_size)
    p = log_p.softmax(-1)
    assert counts[2] == 0
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_two_choices_with_one_noise_are_equal_as_often_as_the_paper_says():
    n = 20_000
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]).double().log(), torch.tensor([0.25, 0.25, 0.25, 0.25]).double().log()
    one, other = (shared_choice(log.expand(n, -1), [1] * n, range(n)) for log in (p, q))
    distance = 0.5 * (p.exp() - q.exp()).abs().sum().item()
    bound = (1 - distance) / (1 + distance)
    assert (one == other).double().mean() > bound - 5 * (bound * (1 - bound) / n) ** 0.5
    assert torch.equal(shared_choice(p.expand(n, -1), [1] * n, range(n)), one)
