"""Rounds in, figures out: sums and counts, divided once."""

from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specdecode.decoding.sequence import Round, TokenLogprob


@dataclass
class Verdicts:
    """What became of a drafter's tokens: after the first that is rejected there is no verdict on the others.

    Attributes:
        num_drafts: rounds in which it drafted.
        num_accepted, num_rejected: tokens that were accepted, and that were not.
    """

    num_drafts: int = 0
    num_accepted: int = 0
    num_rejected: int = 0

    def add(self, round: Round) -> None:
        """Counts a round; where an answer is cut off among accepted tokens nothing was rejected."""
        self.num_drafts += 1
        self.num_accepted += round.num_accepted
        self.num_rejected += round.num_accepted < min(round.num_drafted, len(round.tokens))

    @property
    def acceptance(self) -> float:
        """The chance that a token on which there is a verdict is accepted, 0 without any."""
        return _ratio(self.num_accepted, self.num_accepted + self.num_rejected)


@dataclass
class DecodingMetrics:
    """What decoding one or more sequences took.

    Attributes:
        num_target_passes: rounds, each of which is one forward pass of the target for the sequence.
        num_drafts: rounds in which something was drafted.
        num_drafted: tokens drafted.
        num_accepted: drafted tokens that stand in the output.
        num_generated: tokens in the output.
        num_cached: tokens of prompts that need not be computed, since an engine remembered them.
        num_drafted_at: for each position of a draft, how often something was drafted there.
        num_accepted_at: for each position of a draft, how often what was drafted there stands in the output.
        verdicts: what became of each drafter's tokens.
        draft_time_s, verify_time_s: time spent drafting, and scoring and accepting.
        time_to_first_token_s, total_time_s: from the start to the first round's end, and to the last one's.
        logprobs: of the tokens of each answer, if they were asked for.
        prompt_logprobs: of the prompt's tokens but the first, if they were asked for.
    """

    num_target_passes: int = 0
    num_drafts: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_generated: int = 0
    num_cached: int = 0
    num_drafted_at: list[int] = field(default_factory=list)
    num_accepted_at: list[int] = field(default_factory=list)
    verdicts: dict[str, "Verdicts"] = field(default_factory=dict)
    draft_time_s: float = 0.0
    verify_time_s: float = 0.0
    time_to_first_token_s: float = 0.0
    total_time_s: float = 0.0
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, round: Round, elapsed_s: float, answer: int = 0) -> None:
        """Counts one round of an answer, which ended `elapsed_s` after the start."""
        if self.num_target_passes == 0:
            self.time_to_first_token_s = elapsed_s
        self.num_target_passes += 1
        self.num_drafts += round.num_drafted > 0
        if round.drafter is not None:
            self.verdicts.setdefault(round.drafter, Verdicts()).add(round)
        self.num_drafted += round.num_drafted
        self.num_accepted += round.num_accepted
        self.num_generated += len(round.tokens)
        self.num_cached += round.num_cached
        _count_up_to(self.num_drafted_at, round.num_drafted)
        _count_up_to(self.num_accepted_at, round.num_accepted)
        self.draft_time_s += round.draft_time_s
        self.verify_time_s += round.verify_time_s
        self.total_time_s = elapsed_s
        if round.prompt_logprobs is not None:
            self.prompt_logprobs = round.prompt_logprobs
        if round.logprobs is not None:
            self.logprobs.extend([] for _ in range(answer + 1 - len(self.logprobs)))
            self.logprobs[answer].extend(round.logprobs)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over wall time."""
        return _ratio(self.num_generated, self.total_time_s)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0 if nothing was drafted."""
        return _ratio(self.num_accepted, self.num_drafted)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens that a draft yields on average, the target's own one included; 1 if nothing was drafted."""
        return 1 + _ratio(self.num_accepted, self.num_drafts)

    @property
    def tokens_per_target_pass(self) -> float:
        """Generated tokens over the target's forward passes."""
        return _ratio(self.num_generated, self.num_target_passes)


def _count_up_to(counts: list[int], length: int) -> None:
    counts.extend([0] * (length - len(counts)))
    for position in range(length):
        counts[position] += 1


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def expected_tokens(acceptance: Any, k: Any) -> Any:
    """Tokens of a round that drafts `k`, each accepted with the same chance a: (1 - a^(k + 1)) / (1 - a); arrays or numbers.

    Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192, equation 1.
    """
    is_sure = np.greater_equal(acceptance, 1)
    return np.where(is_sure, k + 1.0, (1 - acceptance ** (k + 1)) / np.where(is_sure, 1.0, 1 - acceptance))[()]


def expected_length(runs: Several[np.ndarray], k: int) -> float:
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
