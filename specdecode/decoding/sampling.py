"""Logits in, log-probabilities and tokens out; and the random numbers, which are a function and have no history."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch

from specdecode.decoding.constraints import Scored, constrain
from specdecode.decoding.sequence import SamplingParams
from specdecode.decoding.sequence import Sequence as DecodedSequence
from specdecode.errors import ModelError

# So many rows of a large vocabulary stay in a processor's cache from one operation to the next.
_ROWS_AT_A_TIME = 16
# How many of the most likely tokens are sorted at first. Mostly they hold all that top-k and top-p keep.
_NUM_SORTED = 128
# Sums and maxima over a vocabulary are taken in spans of so many tokens.
_SPAN = 256
_SHORT_SPAN = 64


class Purpose(IntEnum):
    """What a random number decides; numbers of different purposes are independent."""

    DRAFT = 0
    LENGTH = 1
    TOKEN = 2
    NOISE = 3


def uniforms(seeds: Sequence[int], positions: Sequence[int], purpose: Purpose, count: int) -> torch.Tensor:
    """Draws numbers that depend on nothing but the seed, the position where the round began, the purpose and the offset.

    The generator is Philox (Salmon et al. 2011), a counter-based one: the position and the purpose are part of the counter.

    Returns:
        [len(seeds), count], float64, uniform in [0, 1).
    """
    draws = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, position, purpose])).random(count)
        for seed, position in zip(seeds, positions, strict=True)
    ]
    return torch.from_numpy(np.stack(draws))


def gumbel_noise(seeds: Sequence[int], positions: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
    """Draws Gumbel noise that depends on nothing but the seed, the absolute position and the token.

    The token numbers a value of SplitMix64 (Steele et al. 2014), which can be computed without those before it; Philox gives
    the generator's state for each seed and position.

    Args:
        seeds, positions: n each.
        tokens: [n, m].

    Returns:
        [n, m], float64.
    """
    states = [
        np.random.Philox(key=seed, counter=[0, 0, position, Purpose.NOISE]).random_raw()
        for seed, position in zip(seeds, positions, strict=True)
    ]
    state = torch.from_numpy(np.array(states, dtype=np.uint64).view(np.int64)).to(tokens.device)
    x = state[:, None] + (tokens + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15, with the wrap-around of 64 bits
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    x ^= _shift(x, 31)
    u = (_shift(x, 11).double() + 0.5) * 2.0**-53  # inside (0, 1)
    return -(-u.log()).log()


def log_probabilities(logits: torch.Tensor, scored: list[Scored], eos_token_ids: frozenset[int]) -> torch.Tensor:
    """Turns logits, in place if they are float32 or wider, into the log-probabilities that tokens are drawn from.

    A row is one-hot if the temperature is 0, and also under the coupled verifier, where its token is drawn here: from noise
    that the draft draws as well, so that equal distributions give equal tokens.

    Args:
        logits: [sum(num_scored), vocab].
        scored: whose rows they are.
        eos_token_ids: the model's own end tokens.

    Returns:
        [sum(num_scored), vocab], in at least float32; -inf throughout where the request allows none of the model's tokens.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    constrain(logits, scored, eos_token_ids)
    rows = [(part.sequence, position) for part in scored for position in part.positions]
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        chunk = slice(start, start + _ROWS_AT_A_TIME)
        _choose(logits[chunk], rows[chunk])
    return logits


def sample(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Draws one index from each row by inverting its cumulative sum, in float64.

    The sums of spans of the row come first, then those within the span that is met, so that long rows cost one pass.

    Args:
        weights: [n, m], not negative; they need not sum to 1.
        u: [n], uniform in [0, 1).

    Returns:
        [n]; never an index of weight 0.

    Raises:
        ModelError: a row has no positive, finite sum.
    """
    size = weights.shape[1]
    whole = size // _SPAN * _SPAN
    inner = weights[:, :whole].unflatten(1, (-1, _SPAN)).sum(-1)
    sums = torch.cat([inner, weights[:, whole:].sum(-1, keepdim=True)], 1).double()  # [n, spans + 1]
    cumulative = sums.cumsum(-1)
    total = cumulative[:, -1:]
    if not bool((total.isfinite() & (total > 0)).all()):
        raise ModelError("the model gives no token a probability: its logits are not finite")
    level = u.to(weights.device)[:, None] * total
    span = _first_above(cumulative, level)
    places = span * _SPAN + torch.arange(_SPAN, device=weights.device)  # [n, _SPAN]
    within = weights.gather(1, places.clamp(max=size - 1)).double().masked_fill(places >= size, 0.0).cumsum(-1)
    before = cumulative.gather(1, span) - sums.gather(1, span)
    return (span * _SPAN + _first_above(within, (level - before).clamp(min=0.0))).squeeze(-1)


def sparsify(log_p: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps the `size` most likely tokens of each row, [n, vocab], and renormalises.

    Returns:
        the tokens and their probabilities, both [n, min(size, vocab)].
    """
    log_q, support = largest(log_p, min(size, log_p.shape[-1]))
    return support, log_q.softmax(-1)


def largest(values: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the `size` largest values of each row, [n, vocab], in order, and their places: `topk`, quicker on long rows.

    The largest values stand in the spans with the largest maxima, and only those are searched.

    Returns:
        values and places, both [n, size].
    """
    vocab_size = values.shape[1]
    num_spans = vocab_size // _SHORT_SPAN
    if 4 * size > num_spans:
        return values.topk(size)
    whole = num_spans * _SHORT_SPAN
    spans = values[:, :whole].unflatten(1, (num_spans, _SHORT_SPAN)).amax(-1).topk(size, sorted=False).indices  # [n, size]
    inside = torch.arange(_SHORT_SPAN, device=values.device)
    places = (spans[..., None] * _SHORT_SPAN + inside).flatten(1)
    rest = torch.arange(whole, vocab_size, device=values.device).expand(len(values), -1)
    places = torch.cat([places, rest], 1)
    found, order = values.gather(1, places).topk(size)
    return found, places.gather(1, order)


def _choose(logits: torch.Tensor, rows: list[tuple[DecodedSequence, int]]) -> None:
    """Turns a few rows, [n, vocab], into log-probabilities, in place; `rows` are their sequences and positions."""
    maxima, best = logits.max(-1)
    if any(sequence.params.temperature > 0 for sequence, _ in rows):
        _normalise(logits, maxima, [sequence.params for sequence, _ in rows])
        _couple(logits, best, rows)
    if one_hot := [number for number, (sequence, _) in enumerate(rows) if not sequence.params.is_sampled]:
        _make_one_hot(logits, torch.tensor(one_hot, device=logits.device), maxima, best)
    if bool((is_dead := maxima.isneginf()).any()):
        logits.masked_fill_(is_dead[:, None], -torch.inf)


def _normalise(logits: torch.Tensor, maxima: torch.Tensor, params: list[SamplingParams]) -> None:
    """Applies temperature, min_p, top_k and top_p in place, [n, vocab]; leaves anything where the temperature is 0."""
    limits = torch.finfo(logits.dtype)
    temperature = logits.new_tensor([row.temperature or 1.0 for row in params]).clamp(min=limits.tiny)
    # The largest logit becomes 0, which no temperature, however small, turns into infinity.
    logits.sub_(maxima.clamp(min=limits.min)[:, None]).div_(temperature[:, None])
    logits.copy_(logits.log_softmax(-1))
    if any(row.min_p or row.top_k or row.top_p < 1 for row in params):
        logits.masked_fill_(logits < _floors(logits, params)[:, None], -torch.inf)
        logits.copy_(logits.log_softmax(-1))


def _floors(log_p: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
    """The smallest log-probability that min_p, top_k and top_p keep in each row, [n]."""
    vocab_size = log_p.shape[1]
    floors = log_p.amax(-1) + log_p.new_tensor([row.min_p for row in params]).log()
    open_rows = [number for number, row in enumerate(params) if row.top_k or row.top_p < 1]
    size = _NUM_SORTED
    while open_rows:
        size = min(size, vocab_size)
        rows = torch.tensor(open_rows, device=log_p.device)
        ordered, _ = largest(log_p if len(rows) == len(log_p) else log_p[rows], size)
        found, is_final = _floors_of_ordered(ordered, floors[rows], [params[row] for row in open_rows], size == vocab_size)
        floors[rows] = torch.where(is_final, found, floors[rows])
        open_rows = [row for row, final in zip(open_rows, is_final.tolist(), strict=True) if not final]
        size *= 16
    return floors


def _floors_of_ordered(
    ordered: torch.Tensor, floors: torch.Tensor, params: list[SamplingParams], is_whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the floors from each row's largest log-probabilities, [n, size], which are the whole row or its beginning.

    Returns:
        the floors, [n], and whether the beginning sufficed to find each.
    """
    size = ordered.shape[1]
    top_k = torch.tensor([row.top_k or size + 1 for row in params], device=ordered.device)[:, None]
    last = ordered.gather(1, top_k.clamp(max=size) - 1)
    is_kept = (ordered >= floors[:, None]) & ((ordered >= last) | (top_k > size))
    p = ordered.double().exp() * is_kept
    is_all = is_whole | ~is_kept[:, -1]
    is_plain = torch.tensor([not row.min_p and not row.top_k for row in params], device=ordered.device)
    total = torch.where(is_all, p.sum(-1), 1.0)  # of a plain row all is left to top-p, and sums to 1
    top_p = torch.tensor([row.top_p for row in params], dtype=torch.float64, device=ordered.device)
    is_before = p.cumsum(-1) - p < (top_p * total)[:, None]
    is_kept &= is_before | (top_p == 1)[:, None]
    is_kept[:, 0] = True
    found = ordered.masked_fill(~is_kept, torch.inf).amin(-1)
    return found, (is_all | is_plain) & (is_whole | ~is_kept[:, -1])


def _couple(log_p: torch.Tensor, best: torch.Tensor, rows: list[tuple[DecodedSequence, int]]) -> None:
    """Draws the tokens of coupled rows into `best`."""
    coupled = [n for n, (s, _) in enumerate(rows) if s.params.temperature > 0 and s.params.verifier == "coupled"]
    if coupled:
        numbers = torch.tensor(coupled, device=log_p.device)
        best[numbers] = shared_choice(log_p[numbers], [rows[n][0].seed for n in coupled], [rows[n][1] for n in coupled])


def shared_choice(log_p: torch.Tensor, seeds: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """Draws one token from each row, with noise that whoever draws for the same seed and position shares.

    It is the most likely token after Gumbel noise is added, whose distribution is p (the Gumbel-max trick). Where two draw from
    p and q, the tokens are equal with a probability of at least (1 - d) / (1 + d), d the total variation distance of p and q
    (Daliri et al. 2024, arXiv 2408.07978).

    Args:
        log_p: [n, vocab].
        seeds, positions: n each; the position is that of the token.

    Returns:
        [n].
    """
    kept, tokens = largest(log_p, min(_NUM_SORTED, log_p.shape[1]))
    if not bool(kept[:, -1].isneginf().all()):  # more tokens are possible than those
        kept, tokens = log_p, torch.arange(log_p.shape[1], device=log_p.device).expand_as(log_p)
    noisy = kept.double() + gumbel_noise(seeds, positions, tokens)
    return tokens.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(-1)


def _make_one_hot(logits: torch.Tensor, rows: torch.Tensor, maxima: torch.Tensor, best: torch.Tensor) -> None:
    """Makes the given rows those of one certain token, in place."""
    if len(rows) == len(logits):
        logits.fill_(-torch.inf)
    else:
        logits[rows] = -torch.inf
    logits[rows, best[rows]] = maxima[rows] * 0  # not a number where the model's logits are not


def _first_above(cumulative: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """The first place of each row, [n, m], with a sum above the level, [n, 1]; the last that adds to it if there is none."""
    total = cumulative[:, -1:]
    level = torch.minimum(level, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, level, right=True)


def _shift(x: torch.Tensor, count: int) -> torch.Tensor:
    """Shifts 64-bit numbers to the right and fills with zeros, as unsigned ones are."""
    return (x >> count) & ((1 << (64 - count)) - 1)
