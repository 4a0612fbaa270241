"""The nouns of decoding: what is asked for, what is known so far, what was guessed, what a round gave."""

import secrets
from dataclasses import dataclass, field
from typing import Literal

import torch

from specdecode.errors import RequestError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: keep the most likely tokens that together have at least this probability.
        top_k: keep this many most likely tokens; 0 keeps all.
        max_tokens: generate at the most so many tokens.
        stop_token_ids: tokens that end the generation, beside the model's own.
        ignore_eos: go on after the model's own end tokens.
        seed: makes sampling repeatable; drawn at random if None.

    Raises:
        RequestError: a value is outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 128
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < float("inf"), "temperature", self.temperature, "a number of at least 0")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, "0, for all tokens, or a positive number")
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(self.seed is None or 0 <= self.seed < 2**64, "seed", self.seed, "a number in [0, 2**64)")


@dataclass(frozen=True)
class Route:
    """Which drafter guesses for a sequence, and how many tokens a round; `drafter` None or `k` 0 is plain decoding."""

    drafter: str | None = None
    k: int = 0

    def __post_init__(self) -> None:
        _require(self.k >= 0, "K", self.k, "at least 0")


@dataclass(frozen=True)
class Draft:
    """A guess at the next k tokens, and the distribution q that each was drawn from.

    q is sparse: it is zero outside its support of m tokens.

    Attributes:
        tokens: [k].
        support: [k, m] token ids.
        q: [k, m] their probabilities, each row summing to 1; entries of probability 0 may pad a row.
    """

    tokens: list[int]
    support: torch.Tensor
    q: torch.Tensor

    @staticmethod
    def empty() -> "Draft":
        """The guess of nothing, with which a round is one step of plain decoding."""
        return Draft([], torch.empty(0, 1, dtype=torch.long), torch.empty(0, 1))

    def truncate(self, k: int) -> "Draft":
        """The first `k` tokens of the guess."""
        return self if k >= len(self.tokens) else Draft(self.tokens[:k], self.support[:k], self.q[:k])


@dataclass(frozen=True)
class Round:
    """What one round added to one sequence.

    Attributes:
        tokens: accepted drafted tokens, then the target's own one; cut off where the generation stops.
        num_drafted: how many tokens were drafted.
        num_accepted: how many of `tokens`, from the first, were drafted.
        finish_reason: set in a sequence's last round.
        draft_time_s, verify_time_s: what the round's drafting, and its scoring and accepting, took for the whole batch.
    """

    tokens: list[int]
    num_drafted: int
    num_accepted: int
    finish_reason: FinishReason | None
    draft_time_s: float
    verify_time_s: float


@dataclass(eq=False)
class Sequence:
    """One generation: its tokens so far, and how it goes on. The only thing that changes from round to round.

    Attributes:
        id: names the sequence towards whatever remembers computations for it.
        tokens: the prompt and what was generated.
        num_prompt_tokens: how many of `tokens` are the prompt.
        params: the sampling parameters.
        route: the drafter, and how many tokens to draft.
        seed: the seed that random numbers depend on; `params.seed` if that is given.
    """

    tokens: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    route: Route = field(default_factory=Route)
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = field(init=False)
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        if not self.tokens:
            raise RequestError("the prompt is empty: expected at least one token", param="prompt")
        self.tokens = list(self.tokens)  # they grow, and the caller's list must not
        self.num_prompt_tokens = len(self.tokens)
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed

    @property
    def num_remaining(self) -> int:
        """How many tokens may still be generated."""
        return self.params.max_tokens - (len(self.tokens) - self.num_prompt_tokens)

    @property
    def num_wanted(self) -> int:
        """How many tokens are worth drafting: a round adds one more than it accepts."""
        return min(self.route.k, self.num_remaining - 1)


def _require(is_valid: bool, name: str, value: object, expected: str) -> None:
    if not is_valid:
        raise RequestError(f"{name}: expected {expected}, got {value!r}", param=name)
