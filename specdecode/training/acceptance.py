"""A draft, its target and what the target says in; what of a draft's guesses would be accepted out, without decoding.

One pass of both models over an answer tells how every round would have gone: greedily a guess is accepted if it is the target's
own token, sampled with the chance sum(min(p, q)).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from specdecode.training.completions import Completion
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
    """How well a draft guesses what a target says.

    Attributes:
        acceptance: the mean chance that a guess is accepted, sampled at temperature 1.
        accepted_length: the expected tokens of a sampled round, the target's own included.
        agreement: how often the draft's first choice is what the target said.
        greedy: what rounds accept where the target's answers are greedy.
        greedy_length: tokens of such a round, the target's own included.
    """

    acceptance: float
    accepted_length: float
    agreement: float
    greedy: Rounds
    greedy_length: float


@torch.inference_mode()
def score(
    draft: PreTrainedModel, target: PreTrainedModel, completions: Sequence[Completion], k: int, batch_size: int = 16
) -> Scores:
    """Scores a draft on what the target has said, in rounds of `k` drafted tokens."""
    chances: list[np.ndarray] = []
    agrees: list[np.ndarray] = []
    for first in range(0, len(completions), batch_size):
        chosen = [completion for completion in completions[first : first + batch_size] if completion.tokens]
        ids, is_answer = _padded(chosen)
        p, q = (model(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1].cpu() for model in (target, draft))
        places = is_answer[:, 1:]
        lengths = [len(completion.tokens) for completion in chosen]
        chances += [part.numpy() for part in acceptance(p[places], q[places]).split(lengths)]
        agrees += [part.numpy() for part in (q[places].argmax(-1) == ids[:, 1:][places]).split(lengths)]
    greedy = sum((count_rounds(row.tolist(), k) for row in agrees), Rounds())
    num_tokens = sum(map(len, agrees))
    return Scores(
        acceptance=float(np.concatenate(chances).mean()),
        accepted_length=expected_length(chances, k),
        agreement=float(np.concatenate(agrees).mean()),
        greedy=greedy,
        greedy_length=num_tokens / max(1, greedy.num_rounds),
    )


def _padded(completions: Sequence[Completion]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [batch, length], filled up on the right, and which of them are answers."""
    rows = [completion.prompt + completion.tokens for completion in completions]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    is_answer = torch.zeros_like(ids, dtype=torch.bool)
    for number, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        is_answer[number, max(1, len(completion.prompt)) : len(row)] = True
    return ids, is_answer


def count_rounds(agrees: Sequence[bool], k: int) -> Rounds:
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


def expected_length(runs: Sequence[np.ndarray], k: int) -> float:
    """Tokens of a round of `k` drafted ones, the target's own included, on texts whose places accept with these chances.

    A round that stands at place i is expected to give L(i) = 1 + sum over j <= k of the product of the chances of the j places
    from i on (Leviathan et al. 2023, arXiv 2211.17192, before equation 1, with a chance for each place); beyond the end nothing
    is drafted. How many rounds a text takes follows from its end: N(i) = 1 + sum over j of P(a round gives j) N(i + j). What
    is returned is all places by all rounds.

    Args:
        runs: for each text the chances of its places, [n] each.
        k: how many tokens are drafted in a round.
    """
    num_rounds = sum(_num_rounds(np.asarray(run, dtype=np.float64), k) for run in runs)
    return sum(map(len, runs)) / num_rounds if num_rounds else 0.0


def _num_rounds(chances: np.ndarray, k: int) -> float:
    """The expected number of rounds that a text takes."""
    count = len(chances)
    rounds = np.zeros(count + k + 2)  # beyond the end there is none
    for place in range(count - 1, -1, -1):
        reached, expected = 1.0, 1.0
        for offset, chance in enumerate(chances[place : place + k]):
            expected += reached * (1 - chance) * rounds[place + offset + 1]
            reached *= chance
        rounds[place] = expected + reached * rounds[min(count, place + min(k, count - place) + 1)]
    return float(rounds[0])
