"""Logits in, probabilities and tokens out; and the random numbers, which are a function and have no history."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch

from specdecode.decoding.sequence import SamplingParams


class Purpose(IntEnum):
    """What a random number decides; numbers of different purposes are independent."""

    DRAFT = 0
    LENGTH = 1
    TOKEN = 2


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


def probabilities(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Turns logits into the distributions that tokens are drawn from: temperature, top-k, then top-p over what is left.

    Args:
        logits: [n, vocab].
        params: the n rows' parameters; temperature 0 gives a one-hot row.

    Returns:
        [n, vocab], in at least float32, each row summing to 1.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    temperature = logits.new_tensor([[row.temperature] for row in params])
    is_greedy = temperature == 0
    most_likely = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if is_greedy.all():
        return most_likely
    # The largest logit becomes 0, which no temperature, however small, turns into infinity.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature.masked_fill(is_greedy, 1.0)
    kept = _keep_top_p(_keep_top_k(scaled, [row.top_k for row in params]), [row.top_p for row in params])
    return torch.where(is_greedy, most_likely, kept.softmax(-1))


def _keep_top_k(logits: torch.Tensor, top_k: Sequence[int]) -> torch.Tensor:
    """Masks all but each row's `top_k` largest logits; 0 keeps all."""
    vocab_size = logits.shape[-1]
    counts = [min(k, vocab_size) if k else vocab_size for k in top_k]
    if min(counts) == vocab_size:
        return logits
    rank = logits.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return logits.masked_fill(rank >= torch.tensor(counts, device=logits.device)[:, None], -torch.inf)


def _keep_top_p(logits: torch.Tensor, top_p: Sequence[float]) -> torch.Tensor:
    """Masks all but each row's most likely tokens, as many as are needed to reach a probability of `top_p`."""
    if min(top_p) == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    p = ordered.softmax(-1)
    before = p.cumsum(-1) - p  # the probability of all tokens that are more likely
    limit = logits.new_tensor(top_p)[:, None]
    is_dropped = (before >= limit) & (limit < 1)  # `before` rounds to 1 in front of tokens that a row without top-p keeps
    is_dropped[:, 0] = False
    return logits.masked_fill(is_dropped.gather(-1, order.argsort(-1)), -torch.inf)


def sample(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Draws one index from each row by inverting its cumulative sum, in float64.

    Args:
        weights: [n, m], not negative, each row with a positive sum; they need not sum to 1.
        u: [n], uniform in [0, 1).

    Returns:
        [n]; never an index of weight 0.
    """
    cumulative = weights.double().cumsum(-1)
    total = cumulative[:, -1:]
    level = torch.minimum(u.to(weights.device)[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, level, right=True).squeeze(-1)


def sparsify(probs: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keeps the `size` most likely tokens of each row, [n, vocab], and renormalises.

    Returns:
        the tokens and their probabilities, both [n, min(size, vocab)].
    """
    q, support = probs.topk(min(size, probs.shape[-1]), dim=-1)
    return support, q / q.sum(-1, keepdim=True)
