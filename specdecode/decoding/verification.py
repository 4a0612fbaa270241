"""Drafts and the target's distributions in, accepted tokens out.

A verifier is a *law*: the probability of accepting each number of drafted tokens, and the distribution of the token after
them. `accept` draws from the law. Keeping the two apart lets a test add the law up exactly, over all drafts, and compare it
with the target.

Throughout, p is the target and q is the draft.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from specdecode.decoding.sampling import Purpose, sample, uniforms
from specdecode.decoding.sequence import Draft, Sequence
from specdecode.errors import RequestError

VerifierName = Literal["rejection", "block"]


@dataclass(frozen=True)
class Block:
    """A batch of drafts beside the target's distributions at their positions, padded to the longest draft.

    Attributes:
        k: [batch] drafted tokens.
        tokens: [batch, K], K the largest k.
        support, q: [batch, K, m], the sparse distributions that the tokens were drawn from; 0 in the padding.
        p: [sum(k + 1), vocab], the target's distributions at each drafted token and after the last one.
        first: [batch], where in `p` a sequence's distributions begin.
    """

    k: torch.Tensor
    tokens: torch.Tensor
    support: torch.Tensor
    q: torch.Tensor
    p: torch.Tensor
    first: torch.Tensor

    @staticmethod
    def of(drafts: list[Draft], p: torch.Tensor) -> "Block":
        """Pads the drafts; `p` is [sum(k + 1), vocab]."""
        ks = [len(draft.tokens) for draft in drafts]
        longest, widest = max(ks), max(draft.q.shape[1] for draft in drafts)
        tokens = torch.zeros(len(drafts), longest, dtype=torch.long)
        support = torch.zeros(len(drafts), longest, widest, dtype=torch.long)
        q = torch.zeros(len(drafts), longest, widest, dtype=p.dtype)
        for row, draft in enumerate(drafts):
            length, width = draft.q.shape
            tokens[row, :length] = torch.tensor(draft.tokens, dtype=torch.long)
            support[row, :length, :width] = draft.support
            q[row, :length, :width] = draft.q
        k = torch.tensor(ks)
        first = (k + 1).cumsum(0) - (k + 1)
        device = p.device
        return Block(k.to(device), tokens.to(device), support.to(device), q.to(device), p, first.to(device))

    def p_drafted(self) -> torch.Tensor:
        """The target's probability of each drafted token, [batch, K]; anything in the padding."""
        return self.p[self._rows(0), self.tokens]

    def p_supported(self) -> torch.Tensor:
        """The target's probability of each token that might have been drafted after the first 1, 2, ... K, [batch, K, m]."""
        rows = self._rows(1)
        support = torch.cat([self.support[:, 1:], torch.zeros_like(self.support[:, :1])], 1)
        return self.p[rows].gather(-1, support)

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

    def p_after(self, lengths: torch.Tensor) -> torch.Tensor:
        """The target's distribution after the first `lengths` drafted tokens, [batch, vocab]."""
        return self.p[self.first + lengths]

    def _rows(self, offset: int) -> torch.Tensor:
        """Where in `p` the distributions at each drafted token stand, or `offset` tokens later, [batch, K]."""
        place = torch.arange(offset, offset + self.tokens.shape[1], device=self.p.device)
        return (self.first[:, None] + place).clamp(max=len(self.p) - 1)

    def q_after(self, lengths: torch.Tensor) -> torch.Tensor:
        """The draft's distribution after the first `lengths` drafted tokens, [batch, vocab]; 0 past the draft's end."""
        batch, longest, widest = self.q.shape
        dense = self.p.new_zeros(batch, self.p.shape[1])
        if longest == 0:
            return dense
        place = lengths.clamp(max=longest - 1)[:, None, None].expand(-1, 1, widest)
        q = self.q.gather(1, place).squeeze(1) * (lengths < self.k)[:, None]
        return dense.scatter_add_(1, self.support.gather(1, place).squeeze(1), q)


class Verifier(Protocol):
    """The law by which drafted tokens are accepted and the token after them is drawn."""

    def reach(self, block: Block) -> torch.Tensor:
        """The probability of accepting at least 1, 2, ... K drafted tokens, [batch, K], never increasing; 0 in the padding."""
        ...

    def emission(self, block: Block, lengths: torch.Tensor) -> torch.Tensor:
        """Weights of the token that follows `lengths` accepted ones, [batch, vocab]; they need not sum to 1."""
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

    def emission(self, block: Block, lengths: torch.Tensor) -> torch.Tensor:
        """See `Verifier.emission`."""
        p = block.p_after(lengths)
        residual = (p - block.q_after(lengths)).clamp(min=0.0)
        # Where p equals q nothing is ever rejected, but for rounding; then any draw from p is right.
        return torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)


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

    def emission(self, block: Block, lengths: torch.Tensor) -> torch.Tensor:
        """See `Verifier.emission`."""
        p = block.p_after(lengths)
        w = block.weights().gather(1, lengths[:, None])
        residual = (w * p - block.q_after(lengths)).clamp(min=0.0)
        return torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)


def create_verifier(name: str) -> Verifier:
    """Makes the verifier of that name, one of `VerifierName`.

    Raises:
        RequestError: there is none.
    """
    verifiers: dict[str, Verifier] = {"rejection": RejectionVerifier(), "block": BlockVerifier()}
    if name not in verifiers:
        raise RequestError(f"verifier: expected one of {', '.join(verifiers)}, got {name!r}", param="verifier")
    return verifiers[name]


def accept(verifier: Verifier, block: Block, sequences: list[Sequence]) -> tuple[list[int], list[int]]:
    """Draws from the verifier's law.

    Returns:
        for each sequence the number of accepted tokens, and the token that follows them.
    """
    seeds = [sequence.seed for sequence in sequences]
    positions = [len(sequence.tokens) for sequence in sequences]
    u_length = uniforms(seeds, positions, Purpose.LENGTH, 1).to(block.p.device)
    u_token = uniforms(seeds, positions, Purpose.TOKEN, 1).to(block.p.device)
    lengths = (u_length < verifier.reach(block)).sum(-1)
    tokens = sample(verifier.emission(block, lengths), u_token.squeeze(-1))
    return lengths.tolist(), tokens.tolist()
