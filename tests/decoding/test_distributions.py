"""Distributions equal a slow and obvious reference, row by row, in every way that they are asked for."""

import random
from collections import Counter
from math import exp, inf

import pytest
import torch

from specdecode.decoding.constraints import Scored
from specdecode.decoding.distributions import Distributions, draft_distributions
from specdecode.decoding.sampling import sample
from specdecode.decoding.sequence import SamplingParams, Sequence
from specdecode.errors import ModelError

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
        ends_bad_word = any([*text[len(text) - len(word) + 1 :], token] == list(word) for word in params.bad_words_ids)
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


def random_params(rng: random.Random, verifier: str) -> SamplingParams:
    return SamplingParams(
        verifier=verifier,
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


def random_scored(
    seed: int, num_sequences: int = 30, vocab_size: int = 12, verifier: str = "rejection"
) -> tuple[torch.Tensor, list[Scored]]:
    """Logits, [sum(num_scored), vocab], of sequences with a prompt, an output and drafted tokens."""
    rng = random.Random(seed)
    scored = []
    for _ in range(num_sequences):
        tokens = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 12))]
        drafted = [rng.randrange(vocab_size) for _ in range(rng.randint(0, 4))]
        sequence = Sequence(tokens, random_params(rng, verifier), num_prompt_tokens=rng.randint(1, len(tokens)))
        scored.append(Scored(sequence, drafted, rng.randint(1, len(drafted) + 1)))
    num_rows = sum(part.num_scored for part in scored)
    return 2 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), scored


def dense(logits: torch.Tensor, scored: list[Scored]) -> torch.Tensor:
    return Distributions.of(logits.clone(), scored, EOS).dense(torch.arange(len(logits)))


def probabilities(logits: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """One row for each of some parameters, after a prompt of one token."""
    return dense(logits, [Scored(Sequence([0], row), [], 1) for row in params])


@pytest.mark.parametrize("seed", range(8))
def test_a_mixed_batch_equals_the_reference_row_by_row(seed):
    logits, scored = random_scored(seed)
    expected = []
    places = [(part, position) for part in scored for position in part.positions]
    for row, (part, position) in zip(logits.tolist(), places, strict=True):
        start = part.sequence.num_prompt_tokens
        expected.append(reference(row, part.sequence.params, part.tokens[:start], part.tokens[start:position]))
    p = dense(logits, scored)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(p, expected, atol=1e-9, rtol=0)
    assert torch.equal(p > 0, expected > 0)


@pytest.mark.parametrize("verifier", ["rejection", "coupled"])
@pytest.mark.parametrize("vocab_size", [12, 700])
def test_single_tokens_and_lists_are_those_of_the_whole(vocab_size, verifier):
    for seed in range(4):
        logits, scored = random_scored(seed, vocab_size=vocab_size, verifier=verifier)
        p = Distributions.of(logits, scored, EOS)
        whole = p.dense(torch.arange(len(logits)))
        torch.testing.assert_close(whole.sum(-1), torch.ones(len(logits), dtype=torch.float64))
        tokens = torch.randint(vocab_size, (len(logits), 9), generator=torch.Generator().manual_seed(seed))
        single = p.at(torch.arange(len(logits))[:, None], tokens)
        torch.testing.assert_close(single, whole.gather(1, tokens), atol=1e-12, rtol=0)
        for rows in torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed)).split(3):
            listed, weights = p.candidates(rows)
            scattered = torch.zeros(len(rows), vocab_size).double().scatter_add(1, listed, weights)
            torch.testing.assert_close(scattered, whole[rows], atol=1e-12, rtol=0)


@pytest.mark.parametrize("verifier", ["rejection", "coupled"])
def test_a_draft_whose_list_is_the_vocabulary_draws_from_the_same(verifier):
    logits, scored = random_scored(3, verifier=verifier)
    scored = [Scored(part.sequence, part.drafted, 1) for part in scored]
    logits = logits[: len(scored)]
    tokens, q = draft_distributions(logits.clone(), scored, EOS, 12)
    torch.testing.assert_close(torch.zeros(len(scored), 12).double().scatter_add(1, tokens, q), dense(logits, scored))


def test_a_draft_with_a_short_list_renormalises_it():
    logits, scored = random_scored(5)
    scored = [Scored(Sequence(part.sequence.tokens, SamplingParams(temperature=0.7)), [], 1) for part in scored]
    logits = logits[: len(scored)]
    tokens, q = draft_distributions(logits.clone(), scored, EOS, 4)
    expected = (logits.topk(4).values / 0.7).softmax(-1)
    assert torch.equal(tokens, logits.topk(4).indices)
    torch.testing.assert_close(q, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mixed_batch_equals_its_rows_alone(dtype):
    logits, scored = random_scored(7)
    logits = logits.to(dtype)
    together = dense(logits, scored)
    rows = logits.split([part.num_scored for part in scored])
    alone = [dense(part_rows, [part]) for part_rows, part in zip(rows, scored, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=0)


def test_a_sequence_that_grows_is_counted_as_one_that_was_long_from_the_start():
    rng = random.Random(0)
    params = SamplingParams(temperature=1.0, repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.4)
    growing = Sequence([3, 1, 3], params)
    for _ in range(12):
        growing.tokens.extend(rng.randrange(12) for _ in range(rng.randint(1, 4)))
        fresh = Sequence(growing.tokens, params, num_prompt_tokens=3)
        logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(len(growing.tokens)), dtype=torch.float64)
        one, other = (dense(logits, [Scored(s, [5, 5], 3)]) for s in (growing, fresh))
        assert torch.equal(one, other)


def test_a_vocabulary_that_lacks_some_of_the_tokens_passes_them_over():
    params = SamplingParams(
        temperature=1.0,
        logit_bias={9: 5.0},
        bad_words_ids=((8,),),
        allowed_token_ids=frozenset({1, 2, 9}),
        frequency_penalty=1.0,
    )
    p = dense(torch.zeros(1, 5), [Scored(Sequence([1, 9], params), [9], 1)])
    torch.testing.assert_close(p, torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.0]]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_may_say_none_of_its_tokens_has_no_distribution(temperature):
    none, some = (SamplingParams(temperature=temperature, allowed_token_ids={token}) for token in (9, 2))
    _, q = draft_distributions(torch.zeros(2, 5), [Scored(Sequence([1], row), [], 1) for row in (none, some)], EOS, 3)
    assert q.isfinite().all(-1).tolist() == [False, True]


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
    for params in [
        {"top_p": 0.95},
        {"top_k": 200},
        {"top_k": 700, "top_p": 0.9},
        {"min_p": 0.01, "top_p": 0.8},
        {"top_p": 0.3},
    ]:
        ordered, order = (logits / 0.9).softmax(-1).sort(-1, descending=True)
        kept = ordered >= params.get("min_p", 0.0) * ordered[:, :1]
        kept &= torch.arange(size) < params.get("top_k", size)
        ordered = torch.where(kept, ordered, 0.0)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        ordered = torch.where(ordered.cumsum(-1) - ordered < params.get("top_p", 2.0), ordered, 0.0)
        expected = torch.zeros_like(logits).scatter(1, order, ordered / ordered.sum(-1, keepdim=True))
        found = probabilities(logits, [SamplingParams(temperature=0.9, **params)] * 3)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-6)


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert probabilities(logits, [SamplingParams()] * 2).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


def test_float64_is_kept_and_bfloat16_is_promoted():
    logits, scored = random_scored(3)
    assert dense(logits, scored).dtype == torch.float64
    rounded = dense(logits.bfloat16(), scored)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, dense(logits.bfloat16().float(), scored))
    torch.testing.assert_close(rounded.sum(-1), torch.ones(len(rounded)))


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6, 1e30])
def test_extreme_temperatures_give_a_distribution(temperature):
    logits = torch.tensor([[-30.0, 0.0, 25.0, 20.0]])
    p = probabilities(logits, [SamplingParams(temperature=temperature)])
    assert p.sum() == pytest.approx(1)
    assert p.argmax() == 2 or temperature > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error_and_no_token(temperature, wrong):
    row = Scored(Sequence([0], SamplingParams(temperature=temperature)), [], 1)
    p = Distributions.of(torch.tensor([[1.0, wrong, 0.0]]), [row], EOS)
    _, weights = p.candidates(torch.tensor([0]))
    with pytest.raises(ModelError, match="not finite"):
        sample(weights, torch.tensor([0.5]))
