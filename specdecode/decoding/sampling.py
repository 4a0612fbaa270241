"""Weights in, tokens out; and the random numbers, which are a function and have no history."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch

from specdecode.errors import ModelError

# Sums and maxima over a vocabulary are taken in spans of so many tokens.
_SPAN = 256
_SHORT_SPAN = 32
# Below this, searching spans for maxima is not worth it.
_LONG = 1 << 14


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
    if size <= _SPAN:
        cumulative = _checked(weights.double().cumsum(-1))
        return _first_above(cumulative, u.to(weights.device)[:, None] * cumulative[:, -1:]).squeeze(-1)
    whole = size // _SPAN * _SPAN
    inner = weights[:, :whole].unflatten(1, (-1, _SPAN)).sum(-1)
    sums = torch.cat([inner, weights[:, whole:].sum(-1, keepdim=True)], 1).double()  # [n, spans + 1]
    cumulative = _checked(sums.cumsum(-1))
    level = u.to(weights.device)[:, None] * cumulative[:, -1:]
    span = _first_above(cumulative, level)
    places = span * _SPAN + torch.arange(_SPAN, device=weights.device)  # [n, _SPAN]
    within = weights.gather(1, places.clamp(max=size - 1)).double().masked_fill(places >= size, 0.0).cumsum(-1)
    before = cumulative.gather(1, span) - sums.gather(1, span)
    return (span * _SPAN + _first_above(within, (level - before).clamp(min=0.0))).squeeze(-1)


def largest(values: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the `size` largest values of each row, [n, vocab], in order, and their places: `topk`, quicker on long rows.

    The largest values stand in the spans with the largest maxima, and only those are searched.

    Returns:
        values and places, both [n, size].
    """
    vocab_size = values.shape[1]
    num_spans = vocab_size // _SHORT_SPAN
    if vocab_size < _LONG or 4 * size > num_spans:
        return _topk(values, size)
    whole = num_spans * _SHORT_SPAN
    _, spans = _topk(values[:, :whole].unflatten(1, (num_spans, _SHORT_SPAN)).amax(-1), size)  # [n, size]
    places = (spans[..., None] * _SHORT_SPAN + torch.arange(_SHORT_SPAN, device=values.device)).flatten(1)
    if whole < vocab_size:
        rest = torch.arange(whole, vocab_size, device=values.device)
        places = torch.cat([places, rest.expand(len(values), -1)], 1)
    found, order = _topk(values.gather(1, places), size)
    return found, places.gather(1, order)


def _topk(values: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    # Of equals, topk may take any and max takes the first.
    return values.max(-1, keepdim=True) if size == 1 else values.topk(size)


def shared_choice(log_p: torch.Tensor, tokens: torch.Tensor, seeds: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
    """Draws one token from each row, with noise that whoever draws for the same seed and position shares.

    It is the most likely token after Gumbel noise is added, whose distribution is p (the Gumbel-max trick). Where two draw from
    p and q, the tokens are equal with a probability of at least (1 - d) / (1 + d), d the total variation distance of p and q
    (Daliri et al. 2024, arXiv 2408.07978).

    Args:
        log_p, tokens: [n, m], the tokens and their log-probabilities.
        seeds, positions: n each; the position is that of the token.

    Returns:
        [n].
    """
    noisy = log_p.double() + gumbel_noise(seeds, positions, tokens)
    return tokens.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(-1)


def _checked(cumulative: torch.Tensor) -> torch.Tensor:
    total = cumulative[:, -1]
    if not bool(((total > 0) & (total < torch.inf)).all()):
        raise ModelError("the model gives no token a probability: its logits are not finite")
    return cumulative


def _first_above(cumulative: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """The first place of each row, [n, m], with a sum above the level, [n, 1]; the last that adds to it if there is none."""
    total = cumulative[:, -1:]
    level = torch.minimum(level, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, level, right=True)


def _shift(x: torch.Tensor, count: int) -> torch.Tensor:
    """Shifts 64-bit numbers to the right and fills with zeros, as unsigned ones are."""
    return (x >> count) & ((1 << (64 - count)) - 1)
