"""A sequence finds the drafter that is quickest for it; acceptance and times are made up, so that it is known which one is."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from specdecode.decoding.control import Acceptance, AdaptiveLength, Beliefs, FixedLength
from specdecode.decoding.sequence import Arm, Round, Route, SamplingParams, Sequence
from specdecode.errors import RequestError
from tests.decoding.test_control import COSTS, LIMIT, best_length, speed

CHEAP, MODERATE, DEAR = COSTS["cheap"], COSTS["moderate"], COSTS["dear"]
READING = 0.01  # seconds for each token that a drafter has not seen


class Routed:
    """One sequence and its arms, each with an acceptance that may change, and what its rounds take."""

    def __init__(self, acceptance, costs, expected, *, first=None, max_tokens=10**6, reading=READING, seed=0, noise=0.1):
        self.acceptance, self.costs, self.reading, self.noise = acceptance, costs, reading, noise
        self.rng = random.Random(seed)
        arms = tuple(Arm(name, rate) for name, rate in expected.items())
        self.route = Route(first or max(expected, key=expected.get), LIMIT, arms)
        self.max_tokens = max_tokens
        self.policy = AdaptiveLength()
        self.begin()

    def begin(self):
        """Begins another answer, with what was learned of times."""
        self.sequence = Sequence([0] * 50, SamplingParams(max_tokens=self.max_tokens), self.route)
        self.num_read = dict.fromkeys(self.acceptance, 0)
        self.forget()

    def round(self):
        self.policy.plan([self.sequence])
        name, k = self.sequence.route.drafter, self.sequence.k
        unread = len(self.sequence.tokens) - self.num_read[name] if k else 0
        draft_time = self._noisy(self.costs[name].draft_time(k)) + self.reading * unread
        verify_time = self._noisy(self.costs[name].verify_time(k + 1))
        accepted = next((n for n in range(k) if self.rng.random() >= self.acceptance[name]), k)
        self.sequence.tokens += [0] * (accepted + 1)
        if k:
            self.num_read[name] = len(self.sequence.tokens)
        self.policy.observe([self.sequence], [Round([0] * (accepted + 1), k, accepted, None, draft_time, verify_time)])
        self.num_tokens += accepted + 1
        self.seconds += draft_time + verify_time
        self.used.append(name if k else "none")

    def rounds(self, count):
        for _ in range(count):
            self.round()
        return self

    def forget(self):
        self.num_tokens, self.seconds, self.used = 0, 0.0, []

    def _noisy(self, seconds):
        return seconds * self.rng.uniform(1 - self.noise, 1 + self.noise)

    @property
    def speed(self):
        return self.num_tokens / self.seconds


def best_speed(acceptance, costs):
    return max(speed(best_length(acceptance[name], costs[name], 1), acceptance[name], costs[name], 1) for name in acceptance)


def alike(costs, *names):
    return dict.fromkeys(names, costs)


@pytest.mark.parametrize("seed", range(5))
def test_a_good_forecast_is_kept_to(seed):
    world = Routed({"code": 0.85, "chat": 0.4}, alike(MODERATE, "code", "chat"), {"code": 0.8, "chat": 0.4}, seed=seed).rounds(
        300
    )
    assert set(world.used) <= {"code", "none"}
    assert world.used.count("code") > 290


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("costs", [CHEAP, MODERATE], ids=["cheap", "moderate"])
def test_a_wrong_forecast_is_left(costs, seed):
    """Of an answer of some hundred tokens it costs a quarter at the most, and next to nothing in the long run."""
    acceptance = {"code": 0.2, "chat": 0.8}
    world = Routed(acceptance, alike(costs, *acceptance), {"code": 0.8, "chat": 0.5}, seed=seed).rounds(120)
    best = best_speed(acceptance, alike(costs, *acceptance))
    assert world.speed > 0.75 * best
    world.forget()
    world.rounds(600)
    assert world.speed > 0.9 * best


@pytest.mark.parametrize("seed", range(3))
def test_an_arm_is_chosen_for_its_speed_and_not_for_its_acceptance(seed):
    acceptance, costs = {"large": 0.85, "small": 0.75}, {"large": DEAR, "small": CHEAP}
    world = Routed(acceptance, costs, acceptance, seed=seed).rounds(30)
    world.forget()
    world.rounds(300)
    assert world.used.count("small") > 270
    assert world.speed > 0.95 * best_speed(acceptance, costs)


@pytest.mark.parametrize("seed", range(3))
def test_where_no_arm_pays_it_is_about_as_fast_as_plain_decoding(seed):
    acceptance = {"code": 0.1, "chat": 0.15, "generic": 0.05}
    world = Routed(acceptance, alike(DEAR, *acceptance), {"code": 0.8, "chat": 0.7, "generic": 0.6}, seed=seed).rounds(400)
    plain = speed(0, 0.5, DEAR, 1)
    assert world.speed > 0.87 * plain  # each arm is tried once, to learn what it takes
    world.begin()
    world.rounds(400)
    assert world.speed > 0.93 * plain  # in another answer, though forecasts are as wrong as before
    world.forget()
    world.rounds(2000)
    assert world.speed > 0.97 * plain


def answers(world, count, length):
    """Tokens per second of many short answers, once a few long ones have told the times."""
    for _ in range(5):
        world.begin()
        world.rounds(100)
    world.max_tokens = length
    num_tokens, seconds = 0, 0.0
    for _ in range(count):
        world.begin()
        while world.num_tokens < length:
            world.round()
        num_tokens, seconds = num_tokens + world.num_tokens, seconds + world.seconds
    return num_tokens / seconds


@pytest.mark.parametrize("seed", range(3))
def test_a_short_answer_is_not_tried_where_the_forecast_says_that_it_does_not_pay(seed):
    acceptance = {"code": 0.1, "chat": 0.15}
    world = Routed(acceptance, alike(DEAR, *acceptance), acceptance, seed=seed)
    assert answers(world, 40, 10) > 0.97 * speed(0, 0.5, DEAR, 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_short_answer_does_not_pay_for_reading_a_long_text(seed):
    acceptance = {"code": 0.8, "chat": 0.7}
    world = Routed(acceptance, alike(MODERATE, *acceptance), acceptance, seed=seed, reading=1.0)
    assert answers(world, 40, 10) > 0.97 * speed(0, 0.5, MODERATE, 1)


@pytest.mark.parametrize("seed", range(3))
def test_what_was_left_comes_back_when_it_is_better_again(seed):
    acceptance = {"code": 0.9, "chat": 0.6}
    world = Routed(acceptance, alike(MODERATE, *acceptance), {"code": 0.9, "chat": 0.6}, seed=seed).rounds(60)
    world.acceptance["code"] = 0.1
    world.rounds(80)
    assert world.used[-80:].count("chat") > 30  # it is left late, and tried again
    world.acceptance["code"] = 0.9
    world.rounds(300)
    world.forget()
    world.rounds(50)
    assert world.used.count("code") > 40


def test_returns_to_an_arm_that_disappoints_grow_rarer():
    acceptance = {"code": 0.1, "chat": 0.6}
    world = Routed(acceptance, alike(MODERATE, *acceptance), {"code": 0.95, "chat": 0.5}).rounds(3000)
    begun = [n for n, name in enumerate(world.used) if name == "code" and world.used[n - 1] != "code"]
    assert len(begun) < 15
    assert world.used.count("code") < 0.05 * len(world.used)


def test_what_one_arm_is_better_or_worse_than_forecast_moves_the_others():
    """The formula of `Beliefs.rate`: one round, of whose two verdicts one is for a token that was forecast at 0.8."""
    beliefs = Beliefs({name: Acceptance(prior_rate=rate) for name, rate in {"code": 0.8, "chat": 0.6, "generic": 0.1}.items()})
    beliefs.add("code", 1, 4)
    shift = 0.5 * 0.95 * (1 - 2 * 0.8) / (2 + 2)
    assert beliefs.rate("code") == pytest.approx((1 + 2 * 0.8) / 4)
    assert beliefs.rate("chat") == pytest.approx(0.6 + shift)
    assert beliefs.rate("generic") == pytest.approx(0.1 + shift)
    for _ in range(9):
        beliefs.add("code", 0, 4)
    assert beliefs.rate("generic") == 0
    worst = beliefs.rate("chat")
    for _ in range(60):
        beliefs.add("code", 0, 4)
    assert worst < 0.5 < beliefs.rate("chat") < 0.6  # so that it is tried in the end


def test_another_try_waits_until_the_plain_rounds_have_paid_for_its_reading():
    """Reading 50 tokens and those that were added takes as long as 40 rounds: it is worth a tenth of 400 at the earliest."""
    world = Routed({"code": 0.05}, {"code": DEAR}, {"code": 0.8}, reading=0.01).rounds(100)  # learns what things take
    world.reading = 0.8
    world.route = Route("code", LIMIT)
    world.policy._reading_times["code"].add(100, 80.0)
    world.begin()
    tried = [number for number, name in enumerate(world.rounds(400).used) if name == "code"]
    pauses = [later - earlier for earlier, later in pairwise(tried) if later > earlier + 1]
    assert tried[0] == 0
    assert not pauses or min(pauses) > 300


def test_a_change_that_the_rest_of_the_answer_does_not_pay_for_is_not_made():
    """The other arm is better, but would read the text for as long as ten rounds take."""
    acceptance = {"code": 0.5, "chat": 0.7}
    options = {"expected": {"code": 0.5, "chat": 0.7}, "first": "code"}
    costs = alike(MODERATE, *acceptance)

    def learned(reading, max_tokens):
        world = Routed(acceptance, costs, reading=reading, max_tokens=max_tokens, **options)
        world.policy._reading_times["chat"] = line = type(world.policy._verify_time)()
        for count in (10, 60, 110):
            line.add(count, reading * count)
        return world.rounds(8)

    assert "chat" not in learned(0.5, 40).used
    assert "chat" in learned(0.001, 10_000).used


@pytest.mark.parametrize("policy", [AdaptiveLength(), FixedLength()])
def test_a_request_whose_seed_is_a_promise_keeps_its_drafter(policy):
    arms = (Arm("code", 0.1), Arm("chat", 0.9))
    sequence = Sequence([0], SamplingParams(max_tokens=1000, temperature=1.0, seed=1), Route("code", 4, arms))
    for _ in range(50):
        policy.plan([sequence])
        assert (sequence.route.drafter, sequence.k) == ("code", 4)
        policy.observe([sequence], [Round([0], 4, 0, None, 0.4, 1.0)])


def test_sequences_of_one_batch_choose_each_for_itself():
    policy = AdaptiveLength()
    arms = (Arm("code", 0.6), Arm("chat", 0.6))
    rates = [{"code": 0.9, "chat": 0.2}, {"code": 0.2, "chat": 0.9}]
    sequences = [Sequence([0], SamplingParams(max_tokens=10**6), Route("code", 6, arms)) for _ in rates]
    rng = random.Random(0)
    for _ in range(200):
        policy.plan(sequences)
        rounds = []
        for sequence, rate in zip(sequences, rates, strict=True):
            accepted = next((n for n in range(sequence.k) if rng.random() >= rate[sequence.route.drafter]), sequence.k)
            sequence.tokens += [0] * (accepted + 1)
            rounds.append(Round([0] * (accepted + 1), sequence.k, accepted, None, 0.05, 1.0))
        policy.observe(sequences, rounds)
    assert [sequence.route.drafter for sequence in sequences] == ["code", "chat"]


def test_a_route_begins_with_one_of_its_arms():
    arms = (Arm("code", 0.5), Arm("chat", 0.4))
    assert replace(Route("code", 3, arms).through("chat"), k=2) == Route("chat", 2, arms)
    with pytest.raises(RequestError, match="one of the arms, code, chat"):
        Route("generic", 3, arms)
