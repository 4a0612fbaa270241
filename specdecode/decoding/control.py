"""Rounds in, draft lengths and drafters out: who drafts how many tokens next, so that most tokens come out per second.

A round that drafts k tokens for a sequence yields (1 - a^(k + 1)) / (1 - a) tokens on average if each drafted token is accepted
with probability a (Leviathan et al. 2023, equation 1), and costs the time to draft and to verify them. Acceptance is estimated
for each sequence, times are measured, and the lengths with the best ratio for the whole batch are taken, zero included. A
sequence whose route has several arms goes to the one with the best ratio for it, if what is still to be said pays for that.
"""

import weakref
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from specdecode.decoding.metrics import expected_tokens
from specdecode.decoding.sequence import Arm, Round, Sequence

# A sequence is tried with drafts of at least so many tokens for so many rounds, whatever is expected: in the first the draft
# computes the prompt, and only the next can be timed. Not to try could cost a whole answer its speed-up. Where a forecast says
# what will be accepted, and times are known, there is nothing to find out by trying.
_NUM_TRIES, _TRIED_LENGTH = 2, 2
# After so many plain rounds a sequence is tried again; after twice as many the next time, and so on.
_PATIENCE = 32
# An arm that disappointed is not chosen again for so many rounds; for twice as many the next time. Few, as it may have been by
# chance: a stretch of text that is hard to guess is so for all of them.
_REST = 8
# What is believed of the acceptance before the first verdict, and how many verdicts that belief is worth.
_PRIOR_RATE, _PRIOR_TRIALS = 0.7, 2.0
# Another arm must promise so much more speed: estimates err, and a change costs the new drafter's reading of the text.
_MARGIN = 1.1
# An answer is taken to go on for as long as it is already, and so many tokens more; most end before their limit.
_OUTLOOK = 32
# Of an arm that is not asked, so much of what was seen is still believed after each round.
_FADING = 0.98
# By so much of what one arm is better or worse than its forecast the others are expected to be, too, at first: text that is
# hard to guess is so for all of them. 0.54 is the slope of an arm's error on another's over 40 prompts that the embedded router
# was not made for. After each round this counts less, so that an arm that was forecast well is tried in the end.
_COMMON, _COMMON_FADING = 0.5, 0.95
# Reading the text for another try may take so much of the time of the plain rounds before it.
_TRIAL_SHARE = 0.1


class LengthPolicy(Protocol):
    """Chooses how many tokens are drafted for each sequence of a batch."""

    def plan(self, sequences: list[Sequence]) -> None:
        """Sets `k`, at the most `route.k`, of each sequence for the next round."""
        ...

    def observe(self, sequences: list[Sequence], rounds: list[Round]) -> None:
        """Learns from the round that came of it."""
        ...


class FixedLength:
    """Drafts what the route says."""

    def plan(self, sequences: list[Sequence]) -> None:
        """See `LengthPolicy.plan`."""
        for sequence in sequences:
            sequence.k = sequence.route.k

    def observe(self, sequences: list[Sequence], rounds: list[Round]) -> None:
        """See `LengthPolicy.observe`."""


class AdaptiveLength:
    """Drafts as many tokens as pay, by what drafting, verification and acceptance have been so far.

    A request whose seed promises the same answer again, which under rejection and block verification needs the same lengths,
    keeps those of its route.
    """

    def __init__(self) -> None:
        self._verify_time = Line()  # by scored tokens
        self._draft_times: dict[str, Line] = {}  # by drafted tokens, of the longest draft
        self._reading_times: dict[str, Line] = {}  # by tokens that a drafter had not seen before
        self._beliefs: weakref.WeakKeyDictionary[Sequence, Beliefs] = weakref.WeakKeyDictionary()

    def plan(self, sequences: list[Sequence]) -> None:
        """See `LengthPolicy.plan`."""
        for sequence in sequences:
            if len(sequence.route.arms) > 1 and not sequence.params.depends_on_k:
                self._choose_arm(sequence, len(sequences))
        by_drafter = _by_drafter(sequences)
        groups = [self._group(name, members, len(sequences)) for name, members in by_drafter.items()]
        _choose_lengths(groups, self._verify_time, len(sequences))
        for group, members in zip(groups, by_drafter.values(), strict=True):
            for sequence, k, limit in zip(members, group.k.tolist(), group.limits.tolist(), strict=True):
                tried = min(limit, _TRIED_LENGTH) if self._acceptance_of(sequence).num_tries else 0
                sequence.k = sequence.route.k if sequence.params.depends_on_k else max(k, tried)

    def observe(self, sequences: list[Sequence], rounds: list[Round]) -> None:
        """See `LengthPolicy.observe`."""
        if not rounds:
            return
        depths: dict[str, int] = {}
        unread: dict[str, int] = {}  # tokens that drafters had to read first
        has_begun = any(self._acceptance_of(sequence).num_rounds for sequence in sequences)  # else prompts may be computed too
        for sequence, round in zip(sequences, rounds, strict=True):
            acceptance, name = self._acceptance_of(sequence), sequence.route.drafter or ""
            if round.num_drafted:
                depths[name] = max(depths.get(name, 0), round.num_drafted)
                if not acceptance.is_drafting:
                    num_before = len(sequence.tokens) - len(round.tokens)
                    unread[name] = unread.get(name, 0) + num_before - acceptance.num_read
                acceptance.num_read = len(sequence.tokens)
            self._beliefs[sequence].add(name, round.num_accepted, round.num_drafted)
        if has_begun:
            self._verify_time.add(sum(round.num_drafted + 1 for round in rounds), rounds[0].verify_time_s)
        if not unread:
            self._share_draft_time(depths, rounds[0].draft_time_s)
        elif len(unread) == 1 and depths.keys() <= self._draft_times.keys():
            [(name, count)] = unread.items()
            expected = sum(self._draft_time(other).at(depth) for other, depth in depths.items())
            self._reading_times.setdefault(name, Line()).add(count, max(0.0, rounds[0].draft_time_s - expected))

    def _share_draft_time(self, depths: dict[str, int], draft_time_s: float) -> None:
        """Adds one measurement to the line of each drafter; what is more or less than expected is shared alike."""
        expected = {name: self._draft_time(name).at(depth) for name, depth in depths.items()}
        for name, depth in depths.items():
            surplus = (draft_time_s - sum(expected.values())) / len(depths)
            self._draft_time(name).add(depth, max(0.0, expected[name] + surplus))

    def _group(self, name: str, members: list[Sequence], batch: int) -> "_Group":
        rates = np.array([self._rate(sequence, name) for sequence in members])
        limits = np.array([_limit(sequence) if self._pays_to_begin(sequence, batch) else 0 for sequence in members])
        return _Group(self._draft_time(name), rates.clip(0.01, 0.99), limits, limits)

    def _pays_to_begin(self, sequence: Sequence, batch: int) -> bool:
        """Whether what a drafter gains on the tokens that are still expected is more than its reading of the text costs."""
        here, acceptance = sequence.route.drafter or "", self._acceptance_of(sequence)
        if acceptance.is_drafting or not self._verify_time.is_known:
            return True
        plain_s = float(self._verify_time.at(batch))
        if acceptance.num_tries:
            is_first = not acceptance.num_plain
            return is_first or self._reading_s(sequence, here) <= _TRIAL_SHARE * acceptance.num_plain * plain_s
        return self._gain_s(sequence, 1 / plain_s, self._speed(sequence, here, batch), here) > 0

    def _gain_s(self, sequence: Sequence, speed: float, better: float, name: str) -> float:
        """Seconds saved if the rest of the answer comes with `better` tokens/s through `name`, less those of its reading."""
        num_expected = min(sequence.num_remaining, sequence.num_generated + _OUTLOOK)
        return num_expected / speed - num_expected / better - self._reading_s(sequence, name)

    def _reading_s(self, sequence: Sequence, name: str) -> float:
        """Seconds that a drafter needs for what it has not read of the text."""
        num_unread = len(sequence.tokens) - self._belief(sequence, name).num_read
        return float(self._reading_times.get(name, Line()).at(num_unread))

    def _choose_arm(self, sequence: Sequence, batch: int) -> None:
        """Moves a sequence to the arm that promises the most tokens per second, if the gain pays for that one's reading."""
        here = sequence.route.drafter or ""
        arms = [arm.drafter for arm in sequence.route.arms]
        speeds = {name: self._speed(sequence, name, batch) for name in arms if not self._belief(sequence, name).num_resting}
        best = max(speeds, key=lambda name: speeds[name], default=here)
        speed = self._speed(sequence, here, batch)
        if best == here or speeds[best] <= _MARGIN * speed:
            return
        if self._gain_s(sequence, speed, speeds[best], best) > 0:
            self._belief(sequence, here).leave()
            sequence.route = sequence.route.through(best)

    def _speed(self, sequence: Sequence, name: str, batch: int) -> float:
        """Tokens per second of a sequence among `batch` like it, at the best length.

        A drafter whose time is not known yet is taken to need none: it is then tried, and known. Before any time is known, only
        the acceptance counts.
        """
        acceptance = min(max(self._rate(sequence, name), 0.01), 0.99)
        if not self._verify_time.is_known:
            return acceptance
        k = np.arange(_limit(sequence) + 1)
        tokens = expected_tokens(acceptance, k)
        times = np.where(k > 0, self._draft_time(name).at(k), 0.0) + self._verify_time.at(batch * (k + 1))
        return float((tokens / np.maximum(times, 1e-9)).max())

    def _acceptance_of(self, sequence: Sequence) -> "Acceptance":
        return self._belief(sequence, sequence.route.drafter or "")

    def _belief(self, sequence: Sequence, name: str) -> "Acceptance":
        beliefs = self._beliefs.setdefault(sequence, Beliefs())
        if name not in beliefs.arms:
            arm = next((arm for arm in sequence.route.arms if arm.drafter == name), None)
            beliefs.arms[name] = Acceptance() if arm is None else self._forecast_of(arm)
        return beliefs.arms[name]

    def _rate(self, sequence: Sequence, name: str) -> float:
        self._belief(sequence, name)
        return self._beliefs[sequence].rate(name)

    def _forecast_of(self, arm: Arm) -> "Acceptance":
        is_timed = self._draft_time(arm.drafter).is_known and self._verify_time.is_known
        num_tries = 0 if is_timed else _NUM_TRIES
        return Acceptance(prior_rate=arm.acceptance, prior_trials=arm.weight, num_tries=num_tries)

    def _draft_time(self, name: str) -> "Line":
        return self._draft_times.setdefault(name, Line())


@dataclass
class Beliefs:
    """What is believed of a sequence's arms, by drafter: what one of them shows tells something of the others."""

    arms: "dict[str, Acceptance]" = field(default_factory=dict)
    _common: float = _COMMON

    def add(self, name: str, num_accepted: int, num_drafted: int) -> None:
        """Counts a round of one of them; see `Acceptance.add`."""
        self._common *= _COMMON_FADING
        for other, acceptance in self.arms.items():
            if other == name:
                acceptance.add(num_accepted, num_drafted)
            else:
                acceptance.fade()

    def rate(self, name: str) -> float:
        """How likely the next token of an arm is accepted.

        Its forecast is moved by a part of the others' surprise: what was accepted of theirs beyond their forecasts over the
        number of verdicts, which is weighed against none as verdicts are against a forecast.
        """
        acceptance = self.arms[name]
        others = [other for other in self.arms.values() if other is not acceptance]
        surprise = sum(other.surprise for other in others)
        num_trials = sum(other.num_trials for other in others)
        shift = self._common * surprise / (num_trials + acceptance.prior_trials)
        return acceptance.rate_given(min(max(acceptance.prior_rate + shift, 0.0), 1.0))


@dataclass
class Acceptance:
    """How likely a sequence's next token of a drafter is accepted, from its rounds, of which older ones count less."""

    memory: float = 0.95
    prior_rate: float = _PRIOR_RATE
    prior_trials: float = _PRIOR_TRIALS
    num_tries: int = _NUM_TRIES
    is_drafting: bool = False  # as of the last round
    num_rounds: int = 0
    num_read: int = 0  # of the sequence's tokens, those that the drafter has seen
    num_resting: int = 0  # rounds for which it is not to be chosen again
    num_plain: int = 0  # rounds since it drafted last
    num_trials: float = 0.0  # verdicts
    _num_accepted: float = 0.0
    _patience: float = _PATIENCE
    _rest: int = _REST

    @property
    def rate(self) -> float:
        """Accepted tokens over those on which there was a verdict."""
        return self.rate_given(self.prior_rate)

    def rate_given(self, prior_rate: float) -> float:
        """The same with another belief before the first verdict."""
        return (self._num_accepted + prior_rate * self.prior_trials) / (self.num_trials + self.prior_trials)

    @property
    def surprise(self) -> float:
        """How many more tokens were accepted than forecast."""
        return self._num_accepted - self.num_trials * self.prior_rate

    def add(self, num_accepted: int, num_drafted: int) -> None:
        """Counts one round; after a rejection there is no verdict on what was drafted. Many plain rounds make it try again."""
        self.is_drafting = num_drafted > 0
        self.num_rounds += 1
        if num_drafted:
            self._num_accepted = self.memory * self._num_accepted + num_accepted
            self.num_trials = self.memory * self.num_trials + num_accepted + (num_accepted < num_drafted)
            self.num_tries = max(0, self.num_tries - 1)
            self.num_plain = 0
            self._patience = max(_PATIENCE, 0.97 * self._patience)  # it paid for long: a pause may be by mistake
            return
        self.num_plain += 1
        if self.num_plain >= self._patience:
            self._num_accepted, self.num_trials, self.num_tries = 0.0, 0.0, _NUM_TRIES
            self._patience *= 2

    def leave(self) -> None:
        """Counts as left for another arm; if it disappointed, it is not to be chosen again soon, nor as soon the next time."""
        self.is_drafting, self.num_tries = False, _NUM_TRIES
        if self.rate < self.prior_rate:
            self.num_resting = self._rest
            self._rest *= 2

    def fade(self) -> None:
        """Counts a round of another arm: what was seen is believed a little less."""
        self._num_accepted *= _FADING
        self.num_trials *= _FADING
        self.num_resting = max(0, self.num_resting - 1)


@dataclass
class Line:
    """A time as a straight line over a size, fitted to measurements of which older ones count less.

    It goes through their mean, with the slope by which times and sizes differed from it. As long as all sizes were about the
    same, the time is taken to be proportional to the size: shorter drafts look good enough to be tried, which tells the slope.
    """

    memory: float = 0.9
    slope_memory: float = 0.95
    _n: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        """Takes a measurement; one far above the line, as when a prompt is computed on the way, counts as a few times it."""
        highest = 3 * self.at(x) if self._n > 4 else y
        dx, dy = x - self._x, min(y, highest) - self._y
        # One size over and over tells nothing of the slope, and must not make it forgotten.
        if self._n and abs(dx) > 0.1 * x and y <= highest:
            self._xx = self.slope_memory * self._xx + dx * dx
            self._xy = self.slope_memory * self._xy + dx * dy
        self._n = self.memory * self._n + 1
        self._x += dx / self._n
        self._y += dy / self._n

    @property
    def is_known(self) -> bool:
        """Whether there was a measurement."""
        return self._n > 0

    @property
    def slope(self) -> float:
        """Seconds for one more; neither it nor the time at size 0 is ever below 0."""
        steepest = self._y / self._x if self._x else 0.0
        return min(max(0.0, self._xy / self._xx), steepest) if self._xx else steepest

    def at(self, x: Any) -> Any:
        """The time at a size, or at an array of them; 0 before the first measurement."""
        return self._y + self.slope * (x - self._x)


@dataclass
class _Group:
    """The sequences of one drafter: their acceptance, [n], the most that may be drafted, [n], and the lengths, [n]."""

    draft_time: Line
    acceptance: np.ndarray
    limits: np.ndarray
    k: np.ndarray

    def tokens(self, k: np.ndarray) -> np.ndarray:
        """Expected tokens of a round, summed over the sequences; `k` is [n, ...]."""
        tokens: np.ndarray = expected_tokens(self.acceptance.reshape(-1, *[1] * (k.ndim - 1)), k).sum(0)
        return tokens

    def time(self) -> float:
        """Seconds to draft."""
        depth = int(self.k.max(initial=0))
        return float(self.draft_time.at(depth)) if depth else 0.0


def _choose_lengths(groups: list[_Group], verify_time: Line, num_sequences: int) -> None:
    """Sets the lengths of each group, given those of the others, to those with the most tokens per second; twice around."""
    for group in groups * 2:
        rest = [other for other in groups if other is not group]
        rest_tokens = sum(float(other.tokens(other.k)) for other in rest)
        rest_time = sum(other.time() for other in rest)
        rest_drafted = sum(int(other.k.sum()) for other in rest)
        speed = (rest_tokens + float(group.tokens(group.k))) / max(
            1e-9, rest_time + group.time() + float(verify_time.at(num_sequences + rest_drafted + int(group.k.sum())))
        )
        # A token that is accepted less often than its own verification costs tokens elsewhere is not worth it.
        price = min(max(speed * verify_time.slope, 1e-9), 1.0)
        worthwhile = np.floor(np.log(price) / np.log(group.acceptance)).astype(int)
        depths = np.arange(int(group.limits.max(initial=0)) + 1)
        k = np.minimum(np.minimum(group.limits, worthwhile)[:, None], depths)  # [n, depths]
        times = np.where(depths > 0, group.draft_time.at(depths), 0.0)
        times = times + rest_time + verify_time.at(num_sequences + rest_drafted + k.sum(0))
        rates = (rest_tokens + group.tokens(k)) / np.maximum(times, 1e-9)
        group.k = k[:, int(rates.argmax())]


def _limit(sequence: Sequence) -> int:
    """The most tokens that may be drafted for it: one less than are still to come, as the target adds one."""
    return max(0, min(sequence.route.k, sequence.num_remaining - 1))


def _by_drafter(sequences: Several[Sequence]) -> dict[str, list[Sequence]]:
    groups: dict[str, list[Sequence]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.route.drafter or "", []).append(sequence)
    return groups
