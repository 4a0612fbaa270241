"""The nouns of decoding: what is asked for, what is known so far, what was guessed, what a round gave."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch

from specdecode.errors import RequestError
from specdecode.grammar import Allowed, Grammar, Matcher

FinishReason = Literal["stop", "length"]
# Beyond it float32 has no room for what becomes of logits, and one request would fail all those that it is decoded with.
_HOTTEST, _STRONGEST = 1e30, 1e6
VerifierName = Literal["rejection", "block", "coupled"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to stop.

    Applied in this order, as in vLLM: grammar, allowed and bad tokens and `min_tokens`, logit bias, penalties, temperature,
    min_p, top_k, then top_p over what is left. A token that is exactly as likely as the least likely one that is kept is kept
    too.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: keep the most likely tokens that together have at least this probability.
        top_k: keep this many most likely tokens; 0 keeps all.
        min_p: keep tokens that have at least this share of the most likely one's probability.
        repetition_penalty: divides the positive logits of tokens in the prompt or the output, and multiplies the negative ones.
        presence_penalty: is taken off the logits of tokens in the output.
        frequency_penalty: is taken off the logits of tokens in the output, once for each time they are there.
        logit_bias: is added to the logits of these tokens.
        allowed_token_ids: nothing else is generated; None allows all.
        bad_words_ids: token sequences that are never generated.
        grammar: the answer is one of its texts, or the beginning of one where `max_tokens` ends it. It ends where nothing can
            follow; an end token may come where the text is whole. What else forbids tokens cannot stand beside it: there might
            come a place where no token is allowed.
        min_tokens: no end token, of the model or of `stop_token_ids`, is generated before so many others.
        max_tokens: generate at the most so many tokens.
        stop_token_ids: tokens that end the generation, beside the model's own.
        ignore_eos: go on after the model's own end tokens.
        seed: makes sampling repeatable; drawn at random if None.
        logprobs: report the log-probability of each generated token, and those of so many most likely ones; None for neither.
            They are the model's own, before any of the above.
        prompt_logprobs: the same for the prompt's tokens.
        verifier: how drafted tokens are accepted, see `verification`; all of them leave the target's distribution as it is.

    Raises:
        RequestError: a value is outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: frozenset[int] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    grammar: Grammar | None = None
    min_tokens: int = 0
    max_tokens: int = 128
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    verifier: VerifierName = "rejection"

    def __post_init__(self) -> None:
        freeze = partial(object.__setattr__, self)  # any collection will do to begin with
        freeze("logit_bias", dict(self.logit_bias))
        freeze("stop_token_ids", frozenset(self.stop_token_ids))
        freeze("bad_words_ids", tuple(tuple(word) for word in self.bad_words_ids))
        if self.allowed_token_ids is not None:
            freeze("allowed_token_ids", frozenset(self.allowed_token_ids))
        _require(0 <= self.temperature <= _HOTTEST, "temperature", self.temperature, f"a number in [0, {_HOTTEST:g}]")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        _require(0 <= self.top_k < 2**31, "top_k", self.top_k, "0, for all tokens, or a positive number below 2**31")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "a number in [0, 1]")
        repetition = self.repetition_penalty
        expected = f"a number in [{1 / _STRONGEST:g}, {_STRONGEST:g}]"
        _require(1 / _STRONGEST <= repetition <= _STRONGEST, "repetition_penalty", repetition, expected)
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "a number in [-2, 2]")
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "a number in [-2, 2]")
        _require(
            all(-100 <= bias <= 100 for bias in self.logit_bias.values()),
            "logit_bias",
            self.logit_bias,
            "numbers in [-100, 100]",
        )
        _require(self.allowed_token_ids != frozenset(), "allowed_token_ids", [], "at least one token, or None for all")
        _require(all(self.bad_words_ids), "bad_words_ids", self.bad_words_ids, "sequences of at least one token")
        if self.grammar is not None:
            field = self.grammar.field
            _require(self.allowed_token_ids is None, "allowed_token_ids", [...], f"None beside {field}")
            _require(not self.bad_words_ids, "bad_words_ids", self.bad_words_ids, f"none beside {field}")
            _require(self.min_tokens == 0, "min_tokens", self.min_tokens, f"0 beside {field}")
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "at least 0, at most max_tokens")
        _require(self.seed is None or 0 <= self.seed < 2**64, "seed", self.seed, "a number in [0, 2**64)")
        _require(self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "at least 0, or None")
        _require(
            self.prompt_logprobs is None or self.prompt_logprobs >= 0,
            "prompt_logprobs",
            self.prompt_logprobs,
            "at least 0, or None",
        )
        names = get_args(VerifierName)
        _require(self.verifier in names, "verifier", self.verifier, f"one of {', '.join(names)}")

    @property
    def is_sampled(self) -> bool:
        """Whether a distribution is drawn from; if not it is one-hot: greedy, or with the token that shared noise picks."""
        return self.temperature > 0 and self.verifier != "coupled"

    @property
    def depends_on_k(self) -> bool:
        """Whether a seed is given that gives the same tokens again only if as many are drafted each round."""
        return self.seed is not None and self.is_sampled

    @property
    def is_coupled(self) -> bool:
        """Whether tokens are drawn with noise that target and draft share."""
        return self.temperature > 0 and self.verifier == "coupled"

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def end_token_ids(self, eos_token_ids: frozenset[int]) -> frozenset[int]:
        """The tokens that end a generation, given the model's own."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | eos_token_ids

    def choices(self, n: int) -> list["SamplingParams"]:
        """The parameters of each of `n` answers to one prompt, which differ in their seeds."""
        _require(n >= 1, "n", n, "at least 1")
        return [self if self.seed is None else replace(self, seed=(self.seed + number) % 2**64) for number in range(n)]


@dataclass(frozen=True)
class Arm:
    """A drafter that may guess for a sequence, and what is expected of it.

    Attributes:
        drafter: its name.
        acceptance: the chance that a token which it drafts is accepted.
        weight: how many verdicts on drafted tokens that expectation is worth.
    """

    drafter: str
    acceptance: float
    weight: float = 8.0


@dataclass(frozen=True)
class Route:
    """Which drafter guesses for a sequence, and how many tokens a round; `drafter` None or `k` 0 is plain decoding.

    Attributes:
        drafter: who guesses.
        k: at the most so many tokens.
        arms: all who might, `drafter` among them; whoever chooses draft lengths may then choose another drafter too.
    """

    drafter: str | None = None
    k: int = 0
    arms: tuple[Arm, ...] = ()

    def __post_init__(self) -> None:
        _require(self.k >= 0, "K", self.k, "at least 0")
        names = [arm.drafter for arm in self.arms]
        _require(not names or self.drafter in names, "drafter", self.drafter, f"one of the arms, {', '.join(names)}")

    def through(self, drafter: str) -> "Route":
        """The same with another one of the arms."""
        return replace(self, drafter=drafter)


@dataclass(frozen=True)
class Draft:
    """A guess at the next k tokens, and the distribution q that each was drawn from.

    q is sparse: it is zero outside its support of m tokens.

    Attributes:
        tokens: [k].
        support: [k, m] token ids.
        q: [k, m] their probabilities, each row summing to 1; entries of probability 0 may pad a row.
        continues: whether the drafter goes on from the draft's end meanwhile. If all of it is accepted, the round then adds no
            token of the target's own: what stands there next was drafted, and is verified in the next round like any other.
    """

    tokens: list[int]
    support: torch.Tensor
    q: torch.Tensor
    continues: bool = False

    def __post_init__(self) -> None:
        assert self.tokens or not self.continues  # a round adds at least one token

    @property
    def context(self) -> list[int]:
        """The drafted tokens that the target must read to decide on all of them, and on the token of its own."""
        return self.tokens[:-1] if self.continues else self.tokens

    @staticmethod
    def empty() -> "Draft":
        """The guess of nothing, with which a round is one step of plain decoding."""
        return Draft([], torch.empty(0, 1, dtype=torch.long), torch.empty(0, 1))

    @staticmethod
    def certain(tokens: list[int]) -> "Draft":
        """A guess that is not drawn at random: q is 1 at each of its tokens."""
        support = torch.tensor(tokens, dtype=torch.long)[:, None]
        return Draft(tokens, support, torch.ones(support.shape))

    def truncate(self, k: int) -> "Draft":
        """The first `k` tokens of the guess."""
        return self if k >= len(self.tokens) else Draft(self.tokens[:k], self.support[:k], self.q[:k])


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, to the model itself.

    Attributes:
        token: its id.
        logprob: the natural logarithm of its probability.
        rank: how many tokens were at least as likely, itself included.
        top: the most likely tokens with their log-probabilities, as many as were asked for.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Round:
    """What one round added to one sequence.

    Attributes:
        tokens: accepted drafted tokens, then the target's own one unless the draft goes on there; cut off where the generation
            stops.
        num_drafted: how many tokens were drafted.
        num_accepted: how many of `tokens`, from the first, were drafted.
        finish_reason: set in a sequence's last round.
        draft_time_s, verify_time_s: what the round's drafting, and its scoring and accepting, took for the whole batch.
        logprobs: of `tokens`, if they were asked for.
        prompt_logprobs: of the prompt's tokens but the first, in a sequence's first round, if they were asked for.
        drafter: who drafted, None where nothing was.
        num_cached: how many of the prompt's tokens need not be computed, in a sequence's first round.
    """

    tokens: list[int]
    num_drafted: int
    num_accepted: int
    finish_reason: FinishReason | None
    draft_time_s: float
    verify_time_s: float
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    drafter: str | None = None
    num_cached: int = 0


class TokenCounts:
    """Which tokens a sequence holds, and how often each was generated; follows the sequence as it grows.

    Attributes:
        ids: [m] different tokens.
        num_generated: [m] how often each stands in the output.
    """

    def __init__(self, tokens: list[int], num_prompt_tokens: int) -> None:
        self.ids = np.unique(np.array(tokens[:num_prompt_tokens], dtype=np.int64))
        self.num_generated = np.zeros(len(self.ids), dtype=np.int64)
        self._places = {token: place for place, token in enumerate(self.ids.tolist())}
        self._length = num_prompt_tokens
        self._penalty: np.ndarray | None = None

    def follow(self, tokens: list[int]) -> None:
        """Counts the tokens that were added since the last time."""
        if len(tokens) == self._length:
            return
        added = tokens[self._length :]
        self._length = len(tokens)
        self._penalty = None
        if new := [token for token in dict.fromkeys(added) if token not in self._places]:
            self._places.update(zip(new, range(len(self.ids), len(self.ids) + len(new)), strict=True))
            self.ids = np.append(self.ids, new)
            self.num_generated = np.append(self.num_generated, np.zeros(len(new), dtype=np.int64))
        for token in added:
            self.num_generated[self._places[token]] += 1

    def penalty(self, params: SamplingParams) -> np.ndarray:
        """What frequency and presence penalty take off the logit of each token, [m]."""
        if self._penalty is None:  # which a round asks for many times
            penalty = params.frequency_penalty * self.num_generated + params.presence_penalty * (self.num_generated > 0)
            self._penalty = penalty.astype(np.float64)
        return self._penalty

    def place(self, token: int) -> int | None:
        """Where in the arrays a token stands."""
        return self._places.get(token)


@dataclass(eq=False)
class Sequence:
    """One generation: its tokens so far, and how it goes on. The only thing that changes from round to round.

    Attributes:
        id: names the sequence towards whatever remembers computations for it.
        tokens: the prompt and what was generated.
        params: the sampling parameters.
        route: the drafter, and how many tokens to draft at the most.
        num_prompt_tokens: all of the first `tokens` unless it is given, as where a generation is taken up again.
        k: how many tokens to draft in the next round; `route.k` unless someone chooses.
        seed: the seed that random numbers depend on; `params.seed` if that is given.
        prompt_logprobs: of the prompt's tokens but the first, as far as they are computed.
        num_cached: how many of the prompt's tokens were remembered when it was begun.
        matcher: follows the answer through its grammar; None if there is none, or nobody who knows the tokens' text.
    """

    tokens: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    route: Route = field(default_factory=Route)
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    matcher: Matcher | None = field(default=None, repr=False)
    k: int = field(init=False)
    seed: int = field(init=False)
    prompt_logprobs: list[TokenLogprob] = field(init=False, default_factory=list)
    num_cached: int = field(init=False, default=0)
    _counts: TokenCounts | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.tokens:
            raise RequestError("the prompt is empty: expected at least one token", param="prompt")
        self.tokens = list(self.tokens)  # they grow, and the caller's list must not
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.tokens)
        self.k = self.route.k
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed

    @property
    def num_generated(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """How many tokens may still be generated."""
        return self.params.max_tokens - self.num_generated

    @property
    def num_wanted(self) -> int:
        """How many tokens are worth drafting: a round adds one more than it accepts."""
        return min(self.k, self.num_remaining - 1)

    def allowed_after(self, tokens: list[int]) -> Allowed | None:
        """What its grammar allows after the answer so far and some more tokens; None if it has none."""
        return None if self.matcher is None else self.matcher.allowed(self.tokens[self.num_prompt_tokens :] + tokens)

    @property
    def counts(self) -> TokenCounts:
        """How often each token is there."""
        if self._counts is None:
            self._counts = TokenCounts(self.tokens, self.num_prompt_tokens)
        self._counts.follow(self.tokens)
        return self._counts


def _require(is_valid: bool, name: str, value: object, expected: str) -> None:
    if not is_valid:
        raise RequestError(f"{name}: expected {expected}, got {value!r}", param=name)
