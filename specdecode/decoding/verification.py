"""Drafts and the target's distributions in, accepted tokens out.

A verifier is a *law*: the probability of accepting each number of drafted tokens, and the distribution of the token after
them. `accept` draws from the law. Keeping the two apart lets a test add the law up exactly, over all drafts, and compare it
with the target.

Throughout, p is the target and q is the draft.
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Protocol

import torch

from specdecode.decoding.distributions import Distributions
from specdecode.decoding.sampling import Purpose, sample, uniforms
from specdecode.decoding.sequence import Draft, Sequence, VerifierName


@dataclass(frozen=True)
class Block:
    """A batch of drafts beside the target's distributions at their positions, padded to the longest draft.

    Attributes:
        k: [batch] drafted tokens.
        tokens: [batch, K], K the largest k.
        support, q: [batch, K, m], the sparse distributions that the tokens were drawn from; 0 in the padding.
        p: the target's distributions; those of a sequence, at each drafted token and after the last one, stand one after the
            other.
        first: [batch], where in `p` each sequence's begin.

    A draft that continues has no distribution after its last token, and needs none: a row of another sequence stands in for it.
    """

    k: torch.Tensor
    tokens: torch.Tensor
    support: torch.Tensor
    q: torch.Tensor
    p: Distributions
    first: torch.Tensor

    @staticmethod
    def of(drafts: Several[Draft], p: Distributions, first: Several[int] | None = None) -> "Block":
        """Pads the drafts; without `first`, their distributions are all of `p`, in order."""
        ks = [len(draft.tokens) for draft in drafts]
        longest, widest = max(ks), max(draft.q.shape[1] for draft in drafts)
        k = torch.tensor(ks)
        tokens = torch.tensor([draft.tokens + [0] * (longest - len(draft.tokens)) for draft in drafts], dtype=torch.long)
        device, dtype = p.logits.device, p.logits.dtype
        support = _padded([draft.support for draft in drafts], widest)
        q = _padded([draft.q.to(dtype) for draft in drafts], widest)
        starts = torch.tensor(_starts(drafts)[:-1] if first is None else first)
        return Block(k.to(device), tokens.to(device), support.to(device), q.to(device), p, starts.to(device))

    def __getitem__(self, numbers: torch.Tensor) -> "Block":
        """The block of some of the drafts, of which `numbers`, [n], are given."""
        k, tokens, support, q, first = (column[numbers] for column in (self.k, self.tokens, self.support, self.q, self.first))
        return Block(k, tokens, support, q, self.p, first)

    def by_kind(self, lengths: torch.Tensor) -> list[torch.Tensor]:
        """The numbers of the drafts whose p after `lengths` tokens is a short list, and of the others.

        Which token a random number draws depends on the order in which tokens stand, which must not depend on other drafts.
        """
        is_listed = self.p.is_listed[self._row(lengths)]
        return [group for kind in (is_listed, ~is_listed) if len(group := kind.nonzero().squeeze(-1))]

    def p_drafted(self) -> torch.Tensor:
        """The target's probability of each drafted token, [batch, K]; anything in the padding."""
        return self.p.at(self._rows(0), self.tokens)

    def p_supported(self) -> torch.Tensor:
        """The target's probability of each token that might have been drafted after the first 1, 2, ... K, [batch, K, m]."""
        support = torch.cat([self.support[:, 1:], torch.zeros_like(self.support[:, :1])], 1)
        return self.p.at(self._rows(1)[..., None], support)

    def q_supported(self) -> torch.Tensor:
        """The draft's probability of each token that might have been drafted after the first 1, 2, ... K, [batch, K, m]."""
        return torch.cat([self.q[:, 1:], torch.zeros_like(self.q[:, :1])], 1)

    def q_drafted(self) -> torch.Tensor:
        """The draft's probability of each drafted token, [batch, K]; 0 in the padding."""
        return (self.q * (self.support == self.tokens[..., None])).sum(-1)

    def weights(self) -> torch.Tensor:
        """How much of each accepted beginning may be kept, [batch, K + 1]: first 1, then min(1, w * p / q) for each token."""
        q, p = self.q_drafted(), self.p_drafted()
        ratio = torch.where(q > 0, p / q.clamp(min=torch.finfo(q.dtype).tiny), 0.0)
        weights = [torch.ones_like(self.k, dtype=q.dtype)]
        for position in range(ratio.shape[1]):
            weights.append((weights[-1] * ratio[:, position]).clamp(max=1.0))
        return torch.stack(weights, -1)

    def residual(self, lengths: torch.Tensor, w: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of w * p that q does not cover after the first `lengths` drafted tokens: max(0, w * p - q).

        Where it is nothing, it is p: there nothing is ever rejected, but for rounding, and any draw from p is right. Past the
        draft's end q is nothing.

        Args:
            lengths: [batch].
            w: [batch, 1], all 1 if None.

        Returns:
            tokens and their weights, both [batch, m].
        """
        tokens, p = self.p.candidates(self._row(lengths))
        if self.q.shape[1] == 0:
            return tokens, p
        support, q = self._q_after(lengths)
        dense = q.new_zeros(len(q), self.p.logits.shape[1]).scatter_add_(1, support, q)
        residual = ((p if w is None else p * w) - dense.gather(1, tokens)).clamp_(min=0.0)
        return tokens, torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)

    def _q_after(self, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The draft's support and q after the first `lengths` drafted tokens, [batch, m]; q is 0 past the draft's end."""
        batch, longest, widest = self.q.shape
        place = lengths.clamp(max=longest - 1)[:, None, None].expand(batch, 1, widest)
        q = self.q.gather(1, place).squeeze(1) * (lengths < self.k)[:, None]
        return self.support.gather(1, place).squeeze(1), q

    def _row(self, lengths: torch.Tensor) -> torch.Tensor:
        """Where in `p` the distributions after the first `lengths` drafted tokens stand, [batch]."""
        return (self.first + lengths).clamp(max=len(self.p.logits) - 1)

    def _rows(self, offset: int) -> torch.Tensor:
        """Where in `p` the distributions at each drafted token stand, or `offset` tokens later, [batch, K]."""
        place = torch.arange(offset, offset + self.tokens.shape[1], device=self.first.device)
        return (self.first[:, None] + place).clamp(max=len(self.p.logits) - 1)


class Verifier(Protocol):
    """The law by which drafted tokens are accepted and the token after them is drawn."""

    def reach(self, block: Block) -> torch.Tensor:
        """The probability of accepting at least 1, 2, ... K drafted tokens, [batch, K], never increasing; 0 in the padding."""
        ...

    def emission(self, block: Block, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that may follow `lengths` accepted ones, and their weights, both [batch, m]; they need not sum to 1."""
        ...


class RejectionVerifier:
    """Speculative sampling (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2).

    Accepts each drafted token x with probability min(1, p(x) / q(x)); where one is rejected, draws from norm(max(0, p - q)).
    Past the draft's end q is nothing, and the same formula draws from p.
    """

    def reach(self, block: Block) -> torch.Tensor:
        """See `Verifier.reach`."""
        q = block.q_drafted()
        ratio = (block.p_drafted() / q.clamp(min=torch.finfo(q.dtype).tiny)).clamp(max=1.0)
        return torch.where(q > 0, ratio, 0.0).cumprod(-1)

    def emission(self, block: Block, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Verifier.emission`."""
        return block.residual(lengths)


class BlockVerifier:
    """Block verification (Sun et al. 2024, arXiv 2403.10444, algorithm 2): decides on the whole draft jointly.

    It never accepts fewer tokens in expectation than `RejectionVerifier`. With w as in `Block.weights`, and r the sum of
    max(0, w * p - q) over the vocabulary, each beginning of the draft passes with probability r / (r + 1 - w); the longest one
    that passes is accepted, and the token after it is drawn from norm(max(0, w * p - q)). Past the draft's end q is nothing, r
    is w, and the token is drawn from p.
    """

    def reach(self, block: Block) -> torch.Tensor:
        """See `Verifier.reach`."""
        w = block.weights()[:, 1:]
        residual = w - torch.minimum(w[..., None] * block.p_supported(), block.q_supported()).sum(-1)  # [batch, K]
        residual = residual.clamp(min=0.0)
        total = residual + 1 - w
        passes = torch.where(total > 0, residual / total.clamp(min=torch.finfo(w.dtype).tiny), 1.0)
        passes = passes * (torch.arange(w.shape[1], device=w.device) < block.k[:, None])
        return 1 - (1 - passes).flip(-1).cumprod(-1).flip(-1)

    def emission(self, block: Block, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Verifier.emission`."""
        return block.residual(lengths, block.weights().gather(1, lengths[:, None]))


def verifier(name: VerifierName) -> Verifier:
    """Returns the law of that name.

    Under `coupled` (Daliri et al. 2024, arXiv 2408.07978) target and draft draw each token from the same noise, a function of
    seed, absolute position and token, before they meet here: both are one-hot, and rejection accepts while they are equal.
    """
    return BlockVerifier() if name == "block" else RejectionVerifier()


def accept(sequences: list[Sequence], drafts: list[Draft], p: Distributions) -> tuple[list[int], list[list[int]]]:
    """Draws from the law of each sequence's verifier.

    Args:
        sequences: of which the batch is made.
        drafts: one for each.
        p: the target's distributions, sum(k + 1) of them, at each drafted token and after the last one; only sum(k) where the
            drafts continue.

    Returns:
        for each sequence the number of accepted tokens, and all tokens that the round adds.
    """
    first = _starts(drafts)
    lengths: list[int] = [0] * len(sequences)
    added: list[list[int]] = [[] for _ in sequences]
    for name, members in _by_law(sequences, p).items():
        mine, starts = [drafts[index] for index in members], [first[index] for index in members]
        if name is None:
            drawn = _compare(mine, starts, p)
        else:
            drawn = draw(verifier(name), Block.of(mine, p, starts), [sequences[index] for index in members])
        for index, length, token in zip(members, *drawn, strict=True):
            draft, lengths[index] = drafts[index], length
            is_whole = draft.continues and length == len(draft.tokens)
            added[index] = draft.tokens if is_whole else [*draft.tokens[:length], token]
    return lengths, added


def draw(law: Verifier, block: Block, sequences: list[Sequence]) -> tuple[list[int], list[int]]:
    """Draws from one law for a batch: the number of accepted tokens of each draft, and the token after them."""
    u_length, u_token = (_uniforms(sequences, purpose).to(block.first.device) for purpose in (Purpose.LENGTH, Purpose.TOKEN))
    lengths = (u_length < law.reach(block)).sum(-1)
    drawn = torch.zeros_like(lengths)
    for numbers in block.by_kind(lengths):
        tokens, weights = law.emission(block[numbers], lengths[numbers])
        drawn[numbers] = tokens.gather(1, sample(weights, u_token[numbers].squeeze(-1))[:, None]).squeeze(-1)
    return lengths.tolist(), drawn.tolist()


def _by_law(sequences: list[Sequence], p: Distributions) -> dict[VerifierName | None, list[int]]:
    """The numbers of the sequences by their verifier, or None where p is one-hot throughout, and there is nothing to draw.

    Where logits are not finite everything goes by the law, which says so.
    """
    is_finite = bool(p.largest.isfinite().all())
    groups: dict[VerifierName | None, list[int]] = {}
    for index, sequence in enumerate(sequences):
        name = None if is_finite and not sequence.params.is_sampled else sequence.params.verifier
        groups.setdefault(name, []).append(index)
    return groups


def _compare(drafts: list[Draft], first: Several[int], p: Distributions) -> tuple[list[int], list[int]]:
    """What every law draws where p is one-hot: drafted tokens are accepted while they are its choices; then comes the next."""
    choices = p.choice.tolist()
    lengths = []
    for draft, start in zip(drafts, first, strict=True):
        pairs = zip(draft.tokens, choices[start:], strict=False)
        lengths.append(next((place for place, (token, choice) in enumerate(pairs) if token != choice), len(draft.tokens)))
    # A draft that continues has no choice after its last token, and needs none.
    places = [min(start + length, len(choices) - 1) for start, length in zip(first, lengths, strict=True)]
    return lengths, [choices[place] for place in places]


def _starts(drafts: Several[Draft]) -> list[int]:
    """Where in the target's distributions those of each draft begin, and where they end."""
    starts = [0]
    for draft in drafts:
        starts.append(starts[-1] + len(draft.context) + 1)
    return starts


def _uniforms(sequences: list[Sequence], purpose: Purpose) -> torch.Tensor:
    """One number for each sequence, [batch, 1]; 0 where distributions are one-hot and nothing depends on it."""
    u = torch.zeros(len(sequences), 1, dtype=torch.float64)
    if drawn := [number for number, sequence in enumerate(sequences) if sequence.params.is_sampled]:
        u[drawn] = uniforms([sequences[n].seed for n in drawn], [len(sequences[n].tokens) for n in drawn], purpose, 1)
    return u


def _padded(parts: list[torch.Tensor], width: int) -> torch.Tensor:
    """Puts parts of [k, m] together, [batch, K, width], with zeros in the padding."""
    if any(part.shape[1] < width for part in parts):
        parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
