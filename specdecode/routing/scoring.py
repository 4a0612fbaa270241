"""A draft reads what the target has said: how often its first choice was what stands there.

A label for a draft that was not asked, without a pass of the target. Where the target spoke greedily it is the acceptance that
the draft would have had; where it sampled, it is less than that by what the draft's other choices are worth.
"""

import time
from collections.abc import Callable

import torch

from specdecode.backends.backend import ModelBackend, Row

MAX_SCORED = 256  # of an answer's last tokens, in one pass


@torch.inference_mode()
def first_choices(draft: ModelBackend, tokens: list[int], num_prompt_tokens: int) -> tuple[int, int]:
    """How many of an answer's last tokens are the draft's first choice, and of how many.

    Args:
        draft: a model with the target's vocabulary.
        tokens: the prompt and the answer.
        num_prompt_tokens: how many of them are the prompt.
    """
    num_scored = min(len(tokens) - max(1, num_prompt_tokens), MAX_SCORED)
    if num_scored <= 0 or len(tokens) > draft.max_length:
        return 0, 0
    logits = draft.logits([Row("first choices", tokens[:-1], num_scored)])
    said = torch.tensor(tokens[-num_scored:], device=logits.device)
    return int((logits.argmax(-1) == said).sum()), num_scored


class Budget:
    """A share of the time, for work that must not be felt.

    Args:
        share: of 1.
        now: tells the time in seconds.
    """

    def __init__(self, share: float, now: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._now = now
        self._free_at = 0.0

    @property
    def is_free(self) -> bool:
        """Whether there is time for more."""
        return self._share > 0 and self._now() >= self._free_at

    def spend(self, seconds: float) -> None:
        """Takes what was spent: nothing more for as long as makes it the share."""
        self._free_at = self._now() + seconds * (1 / self._share - 1)


def read_within(budget: Budget, draft: ModelBackend, tokens: list[int], num_prompt_tokens: int) -> tuple[int, int] | None:
    """`first_choices`, if there is time for it; None if not."""
    if not budget.is_free:
        return None
    started = time.perf_counter()
    found = first_choices(draft, tokens, num_prompt_tokens)
    budget.spend(time.perf_counter() - started)
    return found
