"""A draft, its target and texts in; what of a draft's guesses would be accepted out, without decoding.

One pass of both models over an answer tells how every round would have gone: greedily a guess is accepted if it is the target's
own token, sampled with the chance sum(min(p, q)).
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from specdecode.decoding.metrics import expected_length
from specdecode.training.examples import Example
from specdecode.training.losses import acceptance


@dataclass(frozen=True)
class Rounds:
    """Sums over rounds; divide once."""

    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def __add__(self, other: "Rounds") -> "Rounds":
        return Rounds(
            self.num_rounds + other.num_rounds,
            self.num_drafted + other.num_drafted,
            self.num_accepted + other.num_accepted,
        )

    @property
    def rate(self) -> float:
        """Accepted tokens per drafted token."""
        return self.num_accepted / max(1, self.num_drafted)


@dataclass(frozen=True)
class Scores:
    """How well a draft guesses texts and what a target would say in them.

    Attributes:
        loss: the draft's cross-entropy on the texts, in nats per token.
        entropy: of the draft's distributions there; as large as the loss where the texts are such as it would say.
        acceptance: the mean chance that a guess is accepted, sampled at temperature 1.
        accepted_length: the expected tokens of a sampled round, the target's own included.
        agreement: how often the draft's first choice is the target's.
        greedy: what rounds accept if the texts are the target's own, said greedily.
        greedy_length: tokens of such a round, the target's own included.
    """

    loss: float
    entropy: float
    acceptance: float
    accepted_length: float
    agreement: float
    greedy: Rounds
    greedy_length: float


@torch.inference_mode()
def score(draft: PreTrainedModel, target: PreTrainedModel, texts: Several[Example], k: int, batch_size: int = 16) -> Scores:
    """Scores a draft on the learned places of texts, in rounds of `k` drafted tokens."""
    losses, entropies, agrees = [], [], []
    runs: list[np.ndarray] = []  # the chance of each place, and whether the draft's first choice is what comes there
    is_right: list[np.ndarray] = []
    for first in range(0, len(texts), batch_size):
        ids, is_scored = _padded(texts[first : first + batch_size])
        places = is_scored[:, 1:]
        p, q = (
            model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].cpu()[places] for model in (target, draft)
        )
        said = ids[:, 1:][places]
        losses.append(torch.nn.functional.cross_entropy(q.float(), said, reduction="none"))
        entropies.append(torch.distributions.Categorical(logits=q.float(), validate_args=False).entropy())
        agrees.append(p.argmax(-1) == q.argmax(-1))
        for values, found in ((acceptance(p, q), runs), (q.argmax(-1) == said, is_right)):
            rows = np.zeros(is_scored.shape, dtype=values.numpy().dtype)
            rows[is_scored.numpy()] = values.numpy()
            found += [run for row, scored in zip(rows, is_scored.numpy(), strict=True) for run in split_runs(row, scored)]
    greedy = sum((count_rounds(row.tolist(), k) for row in is_right), Rounds())
    return Scores(
        loss=torch.cat(losses).mean().item(),
        entropy=torch.cat(entropies).mean().item(),
        acceptance=float(np.concatenate(runs).mean()),
        accepted_length=expected_length(runs, k),
        agreement=torch.cat(agrees).float().mean().item(),
        greedy=greedy,
        greedy_length=sum(map(len, is_right)) / max(1, greedy.num_rounds),
    )


def _padded(texts: Several[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [batch, length], filled up on the right, and which of them are scored."""
    ids = torch.zeros(len(texts), max(len(text.ids) for text in texts), dtype=torch.long)
    is_scored = torch.zeros_like(ids, dtype=torch.bool)
    for number, text in enumerate(texts):
        ids[number, : len(text.ids)] = torch.from_numpy(text.ids)
        is_scored[number, : len(text.ids)] = torch.from_numpy(text.is_scored)
    return ids, is_scored


def split_runs(values: np.ndarray, is_scored: np.ndarray) -> list[np.ndarray]:
    """The values of each run of scored places, of a row [length]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_scored.astype(np.int8), [0]])))
    return [values[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]


def count_rounds(agrees: Several[bool], k: int) -> Rounds:
    """What rounds of `k` drafted tokens accept, if `agrees[i]` says whether the draft guesses the i-th token right.

    A round accepts up to the first wrong guess and adds one token of the target's own. Guesses beyond the end count for
    nothing.
    """
    total, position = Rounds(), 0
    while position < len(agrees):
        guesses = agrees[position : position + k]
        num_accepted = next((index for index, agree in enumerate(guesses) if not agree), len(guesses))
        total += Rounds(1, len(guesses), num_accepted)
        position += num_accepted + 1
    return total
