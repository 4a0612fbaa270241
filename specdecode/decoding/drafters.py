"""Sequences in, guesses out. A guess may be wrong, late or empty, and costs only speed."""

from collections.abc import Mapping
from typing import Protocol

import torch

from specdecode.backends.backend import ModelBackend, Row
from specdecode.decoding.sampling import Purpose, probabilities, sample, sparsify, uniforms
from specdecode.decoding.sequence import Draft, Sequence

DEFAULT_SUPPORT = 64


class Drafter(Protocol):
    """Guesses how sequences go on."""

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """Drafts at the most `num_wanted` tokens for each sequence."""
        ...


class NoDrafter:
    """Guesses nothing, which makes decoding plain."""

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """See `Drafter.propose`."""
        return [Draft.empty() for _ in sequences]


class ModelDrafter:
    """Guesses with a smaller model, all sequences together.

    Args:
        backend: the draft model.
        support: how many tokens each q covers at the most; the fewer, the less there is to send, and the draft stays exact.
        vocab_size: tokens from this one on, which the target does not have, are never drafted.
    """

    def __init__(self, backend: ModelBackend, *, support: int = DEFAULT_SUPPORT, vocab_size: int | None = None) -> None:
        self.backend = backend
        self._support = support
        self._vocab_size = vocab_size or backend.vocab_size

    @torch.inference_mode()
    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """See `Drafter.propose`."""
        ks = [self._k(sequence) for sequence in sequences]
        longest = max(ks)
        size = self._support if any(sequence.params.temperature > 0 for sequence in sequences) else 1
        u = uniforms([s.seed for s in sequences], [len(s.tokens) for s in sequences], Purpose.DRAFT, longest)
        tokens: list[list[int]] = [[] for _ in sequences]
        steps: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in sequences]
        for offset in range(longest):
            active = [index for index, k in enumerate(ks) if k > offset]
            rows = [Row(sequences[i].id, sequences[i].tokens + tokens[i], 1) for i in active]
            drawn, support, q = self._step(rows, [sequences[i] for i in active], size, u[active, offset])
            for place, index in enumerate(active):
                tokens[index].append(drawn[place])
                steps[index].append((support[place], q[place]))
        return [_draft(drafted, parts) for drafted, parts in zip(tokens, steps, strict=True)]

    def _k(self, sequence: Sequence) -> int:
        if max(sequence.tokens) >= self.backend.vocab_size:  # the target may know tokens that the draft does not
            return 0
        return max(0, min(sequence.num_wanted, self.backend.max_length - len(sequence.tokens)))

    def _step(
        self, rows: list[Row], sequences: list[Sequence], size: int, u: torch.Tensor
    ) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """Drafts one token for each row; returns the tokens and their q, [rows, m], m at the most `size`."""
        params = [sequence.params for sequence in sequences]
        logits = self.backend.logits(rows)[:, : self._vocab_size]
        support, q = sparsify(probabilities(logits, params), size)
        drawn = support.gather(-1, sample(q, u)[:, None]).squeeze(-1)
        return drawn.tolist(), support.cpu(), q.cpu()


class RoutedDrafter:
    """A drafter made of drafters: each sequence goes to the one that its route names.

    Args:
        drafters: by name; a sequence whose route names none of them is not drafted for.
    """

    def __init__(self, drafters: Mapping[str, Drafter]) -> None:
        self._drafters = dict(drafters)

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """See `Drafter.propose`."""
        drafts = [Draft.empty() for _ in sequences]
        for name, drafter in self._drafters.items():
            members = [i for i, s in enumerate(sequences) if s.route.drafter == name and s.num_wanted > 0]
            if members:
                for index, draft in zip(members, drafter.propose([sequences[i] for i in members]), strict=True):
                    drafts[index] = draft
        return drafts


def _draft(tokens: list[int], steps: list[tuple[torch.Tensor, torch.Tensor]]) -> Draft:
    if not tokens:
        return Draft.empty()
    return Draft(tokens, torch.stack([support for support, _ in steps]), torch.stack([q for _, q in steps]))
