"""Exact probabilities of token sequences: those that speculative decoding emits, and those of the target alone.

Nothing is drawn. Every draft, every number of accepted tokens and every token after them is followed, with its probability.
"""

from collections import Counter
from itertools import product
from unittest import mock

import torch

from specdecode.backends.backend import ModelBackend, Row
from specdecode.decoding.drafters import Drafter
from specdecode.decoding.sampling import probabilities
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.decoding.verification import Block, Verifier

Law = Counter[tuple[int, ...]]


def emitted_law(
    target: ModelBackend,
    drafter: Drafter,
    verifier: Verifier,
    *,
    prompt: list[int],
    params: SamplingParams,
    k: int,
    support: int,
    length: int,
) -> Law:
    """The probability of each sequence of the first `length` tokens, over all rounds with `k` drafted tokens each.

    `support` is the width of the drafter's q.
    """
    finished: Law = Counter()
    unfinished: Law = Counter({(): 1.0})
    while unfinished:
        begun, unfinished = unfinished, Counter()
        for emitted, chance in begun.items():
            sequence = Sequence(prompt + list(emitted), params, Route("draft", k))
            for tokens, probability in _round_law(target, drafter, verifier, sequence, support).items():
                longer = (emitted + tokens)[:length]
                (finished if len(longer) == length else unfinished)[longer] += chance * probability
    return finished


def target_law(target: ModelBackend, *, prompt: list[int], params: SamplingParams, length: int) -> Law:
    """The probability of each sequence of `length` tokens when the target decodes alone."""
    law: Law = Counter({(): 1.0})
    for _ in range(length):
        rows = [Row("", prompt + list(tokens), 1) for tokens in law]
        p = probabilities(target.logits(rows), [params] * len(rows)).tolist()
        law = Counter(
            {
                (*tokens, token): chance * p_token
                for (tokens, chance), row in zip(law.items(), p, strict=True)
                for token, p_token in enumerate(row)
            }
        )
    return law


def expected_accepted(target: ModelBackend, drafter: Drafter, verifier: Verifier, sequence: Sequence, support: int) -> float:
    """How many drafted tokens a round accepts on average, over all drafts."""
    drafts, chances = _every_draft(drafter, sequence, support)
    return float((chances[:, None] * verifier.reach(_block(target, sequence, drafts))).sum())


def largest_difference(one: Law, other: Law) -> float:
    """The largest difference between two laws in the probability of any sequence."""
    return max(abs(one[tokens] - other[tokens]) for tokens in one.keys() | other.keys())


def _round_law(target: ModelBackend, drafter: Drafter, verifier: Verifier, sequence: Sequence, support: int) -> Law:
    """The probability of all that one round may add to the sequence."""
    drafts, chances = _every_draft(drafter, sequence, support)
    k = sequence.route.k
    block = _block(target, sequence, drafts)
    reach = verifier.reach(block)  # [drafts, k]
    edge = reach.new_ones(len(drafts), 1)
    exactly = torch.cat([edge, reach], 1) - torch.cat([reach, 0 * edge], 1)  # [drafts, k + 1]
    law: Law = Counter()
    for length in range(k + 1):
        weights = verifier.emission(block, torch.full((len(drafts),), length))
        share = chances * exactly[:, length]
        joint = torch.where(share > 0, share / weights.sum(-1), 0.0)[:, None] * weights  # [drafts, vocab]
        for draft, row in zip(drafts, joint.tolist(), strict=True):
            for token, chance in enumerate(row):
                if chance:
                    law[(*draft.tokens[:length], token)] += chance
    return law


def _block(target: ModelBackend, sequence: Sequence, drafts: list[Draft]) -> Block:
    width = sequence.route.k + 1
    rows = [Row(str(index), sequence.tokens + draft.tokens, width) for index, draft in enumerate(drafts)]
    return Block.of(drafts, probabilities(target.logits(rows), [sequence.params] * (len(rows) * width)))


def _every_draft(drafter: Drafter, sequence: Sequence, support: int) -> tuple[list[Draft], torch.Tensor]:
    """All drafts that the drafter can make, as it reports them, and the probability of each, [drafts]."""
    k = sequence.route.k
    choices = torch.tensor(list(product(range(support), repeat=k)), dtype=torch.long).reshape(support**k, k)
    copies = [Sequence(sequence.tokens, sequence.params, sequence.route) for _ in choices]
    with mock.patch("specdecode.decoding.drafters.sample", side_effect=choices.T):
        drafts = drafter.propose(copies)
    chances = [draft.q.gather(1, choice[:, None]).prod() for draft, choice in zip(drafts, choices, strict=True)]
    assert abs(sum(chances) - 1) < 1e-12
    assert len({tuple(draft.tokens) for draft in drafts}) == len(drafts) == support**k
    return drafts, torch.stack(chances)
