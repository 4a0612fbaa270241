"""A draft and the target's greedy continuations in, greedy acceptance out.

Under greedy decoding a draft's guesses are accepted exactly as long as they are the target's own tokens, so one pass of
the draft over a continuation tells how every round would have gone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from specdecode.training.blocks import pad
from specdecode.training.continuations import Continuation
from specdecode.training.losses import predicting_positions


@dataclass(frozen=True)
class Acceptance:
    """Sums over rounds; divide once."""

    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def __add__(self, other: "Acceptance") -> "Acceptance":
        return Acceptance(
            self.num_rounds + other.num_rounds,
            self.num_drafted + other.num_drafted,
            self.num_accepted + other.num_accepted,
        )

    @property
    def rate(self) -> float:
        """Accepted tokens per drafted token."""
        return self.num_accepted / max(1, self.num_drafted)


def count_rounds(agrees: Sequence[bool], k: int) -> Acceptance:
    """What rounds of `k` drafted tokens accept, if `agrees[i]` says whether the draft guesses the i-th token right.

    A round accepts up to the first wrong guess and adds one token of the target's own. Guesses beyond the end count for
    nothing.
    """
    total, position = Acceptance(), 0
    while position < len(agrees):
        guesses = agrees[position : position + k]
        num_accepted = next((index for index, agree in enumerate(guesses) if not agree), len(guesses))
        total += Acceptance(1, len(guesses), num_accepted)
        position += num_accepted + 1
    return total


@torch.inference_mode()
def greedy_acceptance(
    draft: PreTrainedModel, continuations: Sequence[Continuation], k: int, batch_size: int = 16
) -> Acceptance:
    """How much of the target's greedy `continuations` the draft would have guessed, in rounds of `k` tokens."""
    total = Acceptance()
    for first in range(0, len(continuations), batch_size):
        chosen = continuations[first : first + batch_size]
        batch = pad([(c.prompt, c.tokens) for c in chosen], pad_id=0)
        logits = draft(input_ids=batch.ids.to(draft.device), use_cache=False).logits.cpu()
        guesses = predicting_positions(logits, batch.is_scored).argmax(dim=-1)
        agrees = (guesses == batch.ids[batch.is_scored]).split([len(c.tokens) for c in chosen])
        total = sum((count_rounds(row.tolist(), k) for row in agrees), total)
    return total
