"""Draft lengths follow what drafting costs and yields; the times are made up, so that the best length is known."""

import gc
import random
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import pytest

from specdecode.decoding.control import AdaptiveLength, FixedLength, Line
from specdecode.decoding.sequence import Round, Route, SamplingParams, Sequence

LIMIT = 8


@dataclass(frozen=True)
class Costs:
    """Seconds to draft, and to draft one more token; to verify, and to verify one more token."""

    draft: float
    drafted: float
    verify: float
    verified: float

    def draft_time(self, depth):
        return self.draft + self.drafted * depth if depth else 0.0

    def verify_time(self, num_scored):
        return self.verify + self.verified * num_scored


# A quick draft on a processor with time to spare; a slower one; one far away; and a target that pays for every scored token.
COSTS = {
    "cheap": Costs(0.0, 0.02, 1.0, 0.01),
    "moderate": Costs(0.05, 0.1, 1.0, 0.02),
    "dear": Costs(0.1, 0.5, 1.0, 0.02),
    "far": Costs(0.6, 0.01, 1.0, 0.01),
    "busy": Costs(0.0, 0.1, 0.5, 0.3),
}


class World:
    """Sequences whose drafted tokens are accepted with a probability of their drafter, and what rounds of them take."""

    def __init__(self, acceptance, costs, *, batch=1, limit=LIMIT, noise=0.0, seed=0):
        self.acceptance, self.costs, self.noise = acceptance, costs, noise
        self.rng = random.Random(seed)
        self.sequences = [
            Sequence([0], SamplingParams(max_tokens=10**6), Route(name, limit)) for name in acceptance for _ in range(batch)
        ]
        self.policy = AdaptiveLength()
        self.num_tokens, self.seconds = 0, 0.0

    def round(self):
        """Plans, plays and reports one round, and returns the lengths that were planned."""
        self.policy.plan(self.sequences)
        lengths = [sequence.k for sequence in self.sequences]
        depths = dict.fromkeys(self.acceptance, 0)
        for sequence in self.sequences:
            depths[sequence.route.drafter] = max(depths[sequence.route.drafter], sequence.k)
        draft_time = self._noisy(sum(self.costs[name].draft_time(depth) for name, depth in depths.items()))
        verify_time = self._noisy(next(iter(self.costs.values())).verify_time(sum(lengths) + len(lengths)))
        accepted = [self._accepted(sequence) for sequence in self.sequences]
        rounds = [
            Round([0] * (num + 1), k, num, None, draft_time, verify_time) for num, k in zip(accepted, lengths, strict=True)
        ]
        self.policy.observe(self.sequences, rounds)
        self.num_tokens += sum(accepted) + len(accepted)
        self.seconds += draft_time + verify_time
        return lengths

    def rounds(self, count):
        return [self.round() for _ in range(count)]

    def _accepted(self, sequence):
        rate = self.acceptance[sequence.route.drafter]
        return next((num for num in range(sequence.k) if self.rng.random() >= rate), sequence.k)

    def _noisy(self, seconds):
        return seconds * self.rng.uniform(1 - self.noise, 1 + self.noise)


def speed(k, acceptance, costs, batch):
    """Expected tokens per second if everything is drafted for with k tokens."""
    tokens = batch * sum(acceptance**position for position in range(k + 1))
    return tokens / (costs.draft_time(k) + costs.verify_time(batch * (k + 1)))


def best_length(acceptance, costs, batch, limit=LIMIT):
    return max(range(limit + 1), key=lambda k: speed(k, acceptance, costs, batch))


def is_about_best(k, acceptance, costs, batch=1, tolerance=0.04):
    """Whether a length is within one of the best, or almost as good, as many are where the curve is flat."""
    best = best_length(acceptance, costs, batch)
    speeds = [speed(round(length), acceptance, costs, batch) for length in (k, best)]
    return abs(k - best) <= 1 or speeds[0] > (1 - tolerance) * speeds[1]


def one_world(acceptance, costs, **options):
    return World({"draft": acceptance}, {"draft": costs}, **options)


@pytest.mark.parametrize("noise", [0.0, 0.15], ids=["exact times", "noisy times"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("acceptance", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.98])
@pytest.mark.parametrize("name", COSTS)
def test_the_length_comes_within_one_of_the_best(name, acceptance, batch, noise):
    costs = COSTS[name]
    world = one_world(acceptance, costs, batch=batch, noise=noise)
    world.rounds(100)
    lengths = [k for planned in world.rounds(200) for k in planned]
    assert is_about_best(median(lengths), acceptance, costs, batch, tolerance=0.04 if noise else 0.02), Counter(lengths)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("acceptance", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("name", COSTS)
def test_learning_costs_a_tenth_at_the_most(name, acceptance, batch):
    """Over an answer of some hundred tokens, the first tries and the later ones included."""
    world = one_world(acceptance, COSTS[name], batch=batch)
    world.rounds(300)
    best = speed(best_length(acceptance, COSTS[name], batch), acceptance, COSTS[name], batch)
    assert world.num_tokens / world.seconds > 0.9 * best


@pytest.mark.parametrize("batch", [1, 4])
def test_two_drafters_at_once_get_a_length_each(batch):
    """One is good and cheap and drafts much, one is poor and dear and stops."""
    names, costs = ("good", "poor"), {"good": COSTS["moderate"], "poor": COSTS["dear"]}
    world = World({"good": 0.9, "poor": 0.3}, costs, batch=batch)
    world.rounds(150)
    planned = world.rounds(100)
    typical = {
        name: median(k for lengths in planned for k, s in zip(lengths, world.sequences, strict=True) if s.route.drafter == name)
        for name in names
    }
    assert typical["poor"] == 0
    assert typical["good"] >= 4


def test_two_equal_drafters_are_treated_alike():
    world = World({"one": 0.8, "other": 0.8}, {"one": COSTS["moderate"], "other": COSTS["moderate"]}, batch=4)
    world.rounds(100)
    one, other = (median(k for lengths in world.rounds(100) for k in lengths[part]) for part in (slice(4), slice(4, 8)))
    assert abs(one - other) <= 1
    assert min(one, other) >= 2


def test_sequences_of_one_drafter_get_lengths_by_their_own_acceptance():
    costs = COSTS["moderate"]
    world = one_world(0.5, costs, batch=2)
    sure, unsure = world.sequences
    world._accepted = lambda sequence: sequence.k if sequence is sure else 0
    world.rounds(30)
    assert sure.k == LIMIT
    assert unsure.k == 0


def test_a_draft_that_does_not_pay_is_tried_again_after_ever_longer_pauses():
    world = one_world(0.05, COSTS["dear"])
    lengths = [k for (k,) in world.rounds(1200)]
    tries = [number for number, k in enumerate(lengths) if k and number > 20]
    begun = [number for number in tries if number - 1 not in tries]
    pauses = [later - earlier for earlier, later in pairwise(begun)]
    assert len(pauses) >= 3
    assert all(later > 1.8 * earlier for earlier, later in pairwise(pauses))
    assert len(tries) < 0.02 * len(lengths)


def test_drafting_comes_back_when_acceptance_rises():
    world = one_world(0.05, COSTS["moderate"])
    world.rounds(60)
    assert world.sequences[0].k == 0
    world.acceptance["draft"] = 0.95
    world.rounds(120)
    assert world.sequences[0].k >= best_length(0.95, COSTS["moderate"], 1) - 1


def test_drafting_grows_shorter_when_acceptance_falls():
    world = one_world(0.95, COSTS["moderate"])
    world.rounds(60)
    assert world.sequences[0].k == LIMIT
    world.acceptance["draft"] = 0.3
    world.rounds(30)
    assert median(k for (k,) in world.rounds(30)) <= 2


def test_drafting_grows_shorter_when_the_batch_makes_tokens_dear():
    alone, crowded = (one_world(0.7, COSTS["busy"], batch=batch) for batch in (1, 8))
    for world in (alone, crowded):
        world.rounds(60)
    assert median(k for (k,) in alone.rounds(60)) > median(k for lengths in crowded.rounds(60) for k in lengths)


@pytest.mark.parametrize("limit", [0, 1, 3, 5])
def test_the_routes_length_is_never_exceeded(limit):
    world = one_world(0.98, COSTS["cheap"], batch=3, limit=limit)
    lengths = [k for planned in world.rounds(100) for k in planned]
    assert max(lengths) == limit
    assert min(lengths) >= 0


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_no_more_is_drafted_than_can_be_used(max_tokens):
    policy, sequence = AdaptiveLength(), Sequence([0], SamplingParams(max_tokens=max_tokens), Route("draft", 5))
    while sequence.num_remaining:
        policy.plan([sequence])
        assert 0 <= sequence.k <= min(5, sequence.num_remaining - 1)
        policy.observe([sequence], [Round([0], sequence.k, 0, None, 0.1, 1.0)])
        sequence.tokens.append(0)


def test_the_first_round_of_which_prompts_may_be_a_part_misleads_no_one():
    """The target and the draft compute a long prompt in it, which takes a hundred times as long as a round."""
    world = one_world(0.8, COSTS["moderate"])
    quick = world.costs["draft"]
    world.costs["draft"] = Costs(*(100 * seconds for seconds in (quick.draft, quick.drafted, quick.verify, quick.verified)))
    world.round()
    world.costs["draft"] = quick
    lengths = [k for (k,) in world.rounds(30)]
    assert is_about_best(median(lengths[5:]), 0.8, quick)


def test_a_pause_of_the_machine_is_soon_forgotten():
    world = one_world(0.8, COSTS["moderate"])
    world.rounds(50)
    quick = world.costs["draft"]
    world.costs["draft"] = Costs(*(1000 * seconds for seconds in (quick.draft, quick.drafted, quick.verify, quick.verified)))
    world.round()
    world.costs["draft"] = quick
    world.rounds(5)
    assert is_about_best(median(k for (k,) in world.rounds(30)), 0.8, quick)


def test_a_sequence_for_which_nothing_was_drafted_counts_as_plain():
    """As where its drafter is gone: the others' times do not suffer."""
    world = one_world(0.8, COSTS["moderate"], batch=2)
    lost = Sequence([0], SamplingParams(max_tokens=10**6), Route("lost", 4))
    world.policy.plan([lost])
    for _ in range(40):
        world.policy.observe([lost], [Round([0], 0, 0, None, 0.0, 1.0)])
        world.policy.plan([lost])
        assert 0 <= lost.k <= 4
    world.rounds(100)
    assert is_about_best(median(k for lengths in world.rounds(50) for k in lengths), 0.8, COSTS["moderate"], batch=2)


def test_a_fixed_length_is_the_routes():
    policy = FixedLength()
    sequences = [Sequence([0], SamplingParams(max_tokens=20), Route("draft", k)) for k in range(5)]
    for _ in range(5):
        policy.plan(sequences)
        assert [sequence.k for sequence in sequences] == list(range(5))
        policy.observe(sequences, [Round([0], s.k, 0, None, 9.0, 0.1) for s in sequences])
        sequences[0].k = 3  # whoever else chooses is overruled


def test_a_fixed_length_follows_a_new_route():
    policy, sequence = FixedLength(), Sequence([0], SamplingParams(), Route("draft", 2))
    sequence.route = Route("other", 6)
    policy.plan([sequence])
    assert sequence.k == 6


def test_a_sequence_that_is_gone_is_forgotten():
    world = one_world(0.5, COSTS["cheap"], batch=5)
    world.rounds(3)
    assert len(world.policy._beliefs) == 5
    del world.sequences[1:]
    gc.collect()
    assert len(world.policy._beliefs) == 1


def test_an_empty_batch_teaches_nothing():
    policy = AdaptiveLength()
    policy.plan([])
    policy.observe([], [])


# Times as lines


@pytest.mark.parametrize(("base", "slope"), [(0.0, 1.0), (2.0, 0.0), (1.0, 0.25), (0.0, 0.0)])
def test_a_line_is_found_and_kept_while_only_one_size_is_seen(base, slope):
    line, rng = Line(), random.Random(0)
    for x in [rng.randint(1, 40) for _ in range(30)] + [7] * 500:
        line.add(x, base + slope * x)
    assert line.slope == pytest.approx(slope, abs=1e-9)
    assert line.at(3) == pytest.approx(base + 3 * slope)
    assert line.at(20) == pytest.approx(base + 20 * slope)


def test_a_line_follows_times_that_change():
    line, rng = Line(), random.Random(0)
    for base, slope in [(1.0, 0.1), (3.0, 0.5), (0.5, 0.05)]:
        for _ in range(100):
            x = rng.randint(1, 20)
            line.add(x, base + slope * x)
        assert line.at(10) == pytest.approx(base + 10 * slope, rel=0.05)
        assert line.slope == pytest.approx(slope, rel=0.2)


def test_one_size_says_that_time_is_proportional():
    line = Line()
    for _ in range(3):
        line.add(8, 4.0)
    assert (line.at(8), line.at(4), line.at(16)) == (4.0, 2.0, 8.0)


def test_a_line_never_falls():
    line = Line()
    for x, y in [(1, 5.0), (10, 1.0)] * 10:
        line.add(x, y)
    assert line.slope == 0
    assert line.at(1) == line.at(100) > 0


def test_nothing_is_known_before_the_first_measurement():
    assert Line().at(5) == Line().slope == 0


@pytest.mark.parametrize(
    ("params", "is_kept"),
    [
        (SamplingParams(temperature=1.0, seed=1), True),
        (SamplingParams(temperature=1.0, seed=1, verifier="block"), True),
        (SamplingParams(temperature=1.0, seed=1, verifier="coupled"), False),
        (SamplingParams(temperature=1.0), False),
        (SamplingParams(seed=1), False),
    ],
)
def test_a_seed_that_needs_the_same_lengths_gets_them(params, is_kept):
    policy, sequence = AdaptiveLength(), Sequence([1], replace(params, max_tokens=1000), Route("draft", 7))
    lengths = []
    for _ in range(40):
        policy.plan([sequence])
        lengths.append(sequence.k)
        policy.observe([sequence], [Round([1], sequence.k, 0, None, 0.01 * sequence.k, 0.01)])
    assert (set(lengths) == {7}) == is_kept
