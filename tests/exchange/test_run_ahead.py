"""A draft that goes on meanwhile changes when tokens are drafted, and nothing else: the same drafts, the same output."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import repeat
from typing import Any

import pytest
import torch

from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.table import TableModel, random_table
from specdecode.decoding.drafters import ChainDrafter, Drafter, ModelDrafter, NoDrafter, PromptLookupDrafter, RoutedDrafter
from specdecode.decoding.loop import step
from specdecode.decoding.sequence import Draft, Round, SamplingParams, Sequence, VerifierName
from specdecode.decoding.verification import BlockVerifier, RejectionVerifier, Verifier
from tests.decoding.enumeration import LENGTH, Law, coupled_laws, emitted_laws, largest_difference, target_law
from tests.decoding.recording import counting_model
from tests.exchange.pairs import (
    COUPLED,
    DRAFT,
    EOS,
    GREEDY,
    SAMPLED,
    TARGET,
    VOCAB_SIZE,
    Expecting,
    Working,
    connected,
    decode,
    plain,
    scheduler,
    varied,
)

EVERY = GREEDY + SAMPLED + COUPLED


def at_random(seed: int, most: int = 7) -> Iterator[int]:
    rng = random.Random(seed)
    return iter(lambda: rng.randint(0, most), -1)


def run_ahead(num_steps: Iterator[int], draft: TableModel = DRAFT, **config: Any) -> Working:
    return Working(*connected(scheduler(draft, run_ahead=True, **config)), num_steps)


# The same tokens, whatever the timing


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_the_output_is_the_same_however_far_the_draft_comes_meanwhile(k: int) -> None:
    expected = decode(varied(EVERY, k=k), run_ahead(repeat(0)))
    for num_steps in (repeat(100), *map(at_random, range(4))):
        assert decode(varied(EVERY, k=k), run_ahead(num_steps)) == expected


@pytest.mark.parametrize("options", [{"support": 3}, {"support": 1}, {"min_confidence": 0.3}, {"max_batch": 3}], ids=str)
def test_the_output_is_the_same_whatever_the_drafter_is_set_to(options: dict[str, float]) -> None:
    expected = decode(varied(EVERY), run_ahead(repeat(0), **{**options, "max_batch": 64}))
    for num_steps in (repeat(100), at_random(0), at_random(1)):
        assert decode(varied(EVERY), run_ahead(num_steps, **options)) == expected


def test_a_draft_made_ahead_is_the_one_that_would_be_made_now() -> None:
    drafter = run_ahead(at_random(0))
    expecting = Expecting(drafter, ModelDrafter(DRAFT, eos_token_ids=TARGET.eos_token_ids))
    decode(varied(EVERY, count=4), expecting)
    assert expecting.num_compared > 100
    assert drafter.metrics.num_ahead_used > 50


def test_a_draft_made_ahead_with_a_cache_of_rows_is_the_one_that_would_be_made_now(
    target_folder: str, draft_folder: str
) -> None:
    """Guesses that are dropped leave rows behind that must not be taken for the sequence's own."""
    target, remote, here = (HuggingFaceBackend(folder) for folder in (target_folder, draft_folder, draft_folder))
    drafters = [
        Working(*connected(scheduler(remote, run_ahead=True), target=target), steps) for steps in (at_random(0), at_random(1))
    ]
    outputs = []
    for drafter in drafters:
        sequences = [plain([5, 40, number], max_tokens=30, **kind) for number, kind in enumerate(SAMPLED[:4] + GREEDY[:1])]
        expecting = Expecting(drafter, ModelDrafter(here), tolerance=1e-4)
        outputs.append(decode(sequences, expecting, target))
        assert expecting.num_compared > 20
        assert drafter.metrics.num_ahead_used > 5
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("seed", range(3))
def test_the_output_is_that_of_the_target_alone_where_nothing_is_drawn_but_shared_noise(seed: int) -> None:
    expected = decode(varied(GREEDY + COUPLED, count=3), NoDrafter())
    assert decode(varied(GREEDY + COUPLED, count=3), run_ahead(at_random(seed))) == expected


def rounds_of(sequences: list[Sequence], drafter: Drafter, lengths: random.Random) -> Iterator[list[tuple[Sequence, Round]]]:
    """Decodes with another length for each sequence in each round, as when it is chosen by what pays."""
    while unfinished := [sequence for sequence in sequences if sequence.finish_reason is None]:
        for sequence in unfinished:
            sequence.k = lengths.randint(0, 6)
        yield list(zip(unfinished, step(unfinished, drafter, TARGET), strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_lengths_that_change_from_round_to_round_change_nothing_but_the_lengths(seed: int) -> None:
    """Given the lengths, the output is the same whatever the timing; greedy and coupled it is the target's."""
    outputs = []
    for num_steps in (repeat(0), repeat(100), at_random(seed)):
        sequences = varied(EVERY, count=2)
        drafter = run_ahead(num_steps)
        expecting = Expecting(drafter, ModelDrafter(DRAFT, eos_token_ids=TARGET.eos_token_ids))
        for results in rounds_of(sequences, expecting, random.Random(seed)):
            assert all(0 <= round.num_accepted <= round.num_drafted <= sequence.k for sequence, round in results)
        outputs.append([sequence.tokens for sequence in sequences])
    assert outputs[0] == outputs[1] == outputs[2]
    alone = decode(varied(GREEDY, count=2) + varied(EVERY, count=2)[-2 * len(COUPLED) :], NoDrafter())
    assert outputs[0][: 2 * len(GREEDY)] + outputs[0][-2 * len(COUPLED) :] == alone


# What is drafted ahead, and what is not


def test_a_draft_that_is_always_right_is_ahead_from_the_second_round_on() -> None:
    drafter = run_ahead(repeat(100), TARGET)
    sequence = plain([0], k=4, max_tokens=41, ignore_eos=True)
    rounds = []
    while sequence.finish_reason is None:
        rounds += step([sequence], drafter, TARGET)
    assert [len(round.tokens) for round in rounds] == [4] * 9 + [5]  # only the last adds a token of the target's own
    assert (drafter.metrics.num_ahead, drafter.metrics.num_ahead_used) == (36, 36)
    assert decode([plain([0], max_tokens=41)], NoDrafter()) == [sequence.tokens]


def test_a_draft_that_is_always_wrong_is_never_ahead_and_its_waste_is_counted() -> None:
    """The target counts up, and the draft counts from where it should not."""
    target, wrong = (
        counting_model(VOCAB_SIZE),
        TableModel(lambda tokens: torch.eye(VOCAB_SIZE)[3 if tokens[-1:] != (2,) else 0]),
    )
    drafter = Working(*connected(scheduler(wrong, run_ahead=True), target=target), repeat(100))
    output = decode([plain([0], k=3, max_tokens=15)], drafter, target)
    assert output == [[number % VOCAB_SIZE for number in range(16)]]
    assert drafter.metrics.num_ahead > 20
    assert drafter.metrics.num_ahead_used == 0


def test_what_is_not_drafted_to_its_end_is_used_as_far_as_it_goes() -> None:
    drafter = run_ahead(repeat(2), TARGET)
    decode([plain([0], k=4, max_tokens=41)], drafter)
    metrics = drafter.metrics
    assert metrics.num_ahead == metrics.num_ahead_used == 9 * 2


def test_nothing_is_drafted_ahead_unless_it_is_asked_for() -> None:
    remote, channel = connected(scheduler(TARGET))
    drafter = Working(remote, channel, repeat(100))
    decode([plain([0], max_tokens=41)], drafter)
    assert channel.scheduler.metrics.num_ahead == 0
    assert not channel.scheduler.has_work
    assert not any(draft.continues for draft in remote.propose([plain([0])]))


@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_nothing_is_drafted_ahead_past_the_last_token(max_tokens: int) -> None:
    drafter = run_ahead(repeat(100), TARGET)
    sequence = plain([0], k=4, max_tokens=max_tokens)
    decode([sequence], drafter)
    drafter.propose([])
    metrics = drafter.metrics
    assert sequence.num_generated == max_tokens
    assert metrics.num_extended <= max_tokens - 1
    assert metrics.num_ahead == metrics.num_ahead_used


def test_nothing_is_drafted_ahead_past_an_end_token() -> None:
    target = counting_model(10, eos_token_ids=[EOS])
    drafter = Working(*connected(scheduler(target, run_ahead=True), target=target), repeat(100))
    sequence = plain([0], k=4, ignore_eos=False)
    assert decode([sequence], drafter, target) == [[0, 1, 2, 3, 4, 5, 6]]
    schedule = drafter.channel.scheduler
    assert schedule.metrics.num_extended == EOS  # one token for each, the end token included
    assert not schedule.has_work
    assert sequence.finish_reason == "stop"


def test_nothing_is_drafted_ahead_past_a_stop_token() -> None:
    target = counting_model(10)
    drafter = Working(*connected(scheduler(target, run_ahead=True), target=target), repeat(100))
    assert decode([plain([0], k=4, stop_token_ids={8})], drafter, target) == [list(range(9))]
    assert drafter.metrics.num_extended == 8
    assert not drafter.channel.scheduler.has_work


def test_nothing_is_drafted_ahead_past_the_drafts_longest_sequence() -> None:
    target, short = counting_model(10), counting_model(10, max_length=12)
    drafter = Working(*connected(scheduler(short, run_ahead=True), target=target), repeat(100))
    output = decode([plain([0], k=4, max_tokens=30)], drafter, target)
    assert output == [[number % 10 for number in range(31)]]
    assert drafter.metrics.num_extended == 11  # of the 12 tokens one was the prompt
    assert not drafter.channel.scheduler.has_work


def test_a_draft_that_ended_early_is_not_gone_on_from() -> None:
    """Where the drafter is not confident the target says the next token."""
    remote, _ = connected(scheduler(run_ahead=True, min_confidence=0.1))
    sequences = varied(SAMPLED, count=4)
    drafts = remote.propose(sequences)
    here = ModelDrafter(DRAFT, eos_token_ids=TARGET.eos_token_ids, min_confidence=0.1)
    ended = [len(draft.tokens) < sequence.num_wanted for draft, sequence in zip(drafts, sequences, strict=True)]
    assert 0 < sum(ended) < len(ended)
    assert not any(draft.continues for draft, is_ended in zip(drafts, ended, strict=True) if is_ended)
    assert [draft.tokens for draft in drafts] == [draft.tokens for draft in here.propose(varied(SAMPLED, count=4))]


def test_several_sequences_are_drafted_ahead_together() -> None:
    drafter = run_ahead(repeat(100), TARGET)
    decode([plain([token], k=4, max_tokens=41) for token in range(5)], drafter)
    metrics = drafter.metrics
    assert metrics.num_extended == 5 * metrics.num_passes
    assert metrics.num_ahead_used == metrics.num_ahead == 5 * 36


def test_a_lookup_that_finds_something_leaves_what_the_model_drafted_ahead_to_be_dropped() -> None:
    """The model is not asked in some rounds, and told later of all that came meanwhile."""
    target = counting_model(5)
    remote, channel = connected(scheduler(target, run_ahead=True), target=target)
    drafter = Working(ChainDrafter([PromptLookupDrafter(), remote]), channel, at_random(0))
    routed = RoutedDrafter({"draft": drafter})
    assert decode([plain([0, 3], k=3, max_tokens=40)], routed, target) == [[0, *((number + 3) % 5 for number in range(41))]]
    assert remote.metrics.num_rounds > 0
    assert not remote.metrics.num_fallbacks


# The target's distribution

LAWS: list[dict[str, Any]] = [
    {},
    {"top_k": 3},
    {"top_p": 0.7, "frequency_penalty": 1.0},
    {"bad_words_ids": ((1, 2),), "min_tokens": 1},
]
PROMPT = [0, 1, 2]
FOUR_TOKENS, FOUR_GUESSED = (TableModel(cache(random_table(4, seed, sharpness=1.5)), eos_token_ids=[3]) for seed in (0, 1))
FOUR_NEARLY = TableModel(lambda tokens: 0.9 * random_table(4, 0, sharpness=1.5)(tokens) + 0.025, eos_token_ids=[3])


def assert_is_law_of_target(emitted: list[Law], settings: list[SamplingParams]) -> None:
    for law, params in zip(emitted, settings, strict=True):
        assert sum(law.values()) == pytest.approx(1, abs=1e-9)
        assert largest_difference(law, target_law(FOUR_TOKENS, PROMPT, params)) < 1e-9


@pytest.mark.parametrize(("k", "support"), [(1, 4), (2, 4), (3, 3)])
def test_the_emitted_law_is_the_targets(k: int, support: int) -> None:
    """Over the whole path, from introduction to reply. Later rounds' drafts are the same, as the tests above show."""
    settings = [SamplingParams(temperature=1.0, max_tokens=100, **kind) for kind in LAWS]
    schedule = scheduler(FOUR_GUESSED, run_ahead=True, max_batch=1 << 20, support=support)
    remote, _ = connected(schedule, target=FOUR_TOKENS)
    verifiers: list[Verifier] = [RejectionVerifier(), BlockVerifier()]
    laws = emitted_laws(FOUR_TOKENS, remote, verifiers, prompt=PROMPT, settings=settings, k=k, num_choices=support)
    assert not remote.metrics.num_fallbacks
    for of_verifier in laws:
        assert_is_law_of_target(of_verifier, settings)


class Renewing:
    """Connects anew for every batch, with steps in between; a batch is known by its sequences."""

    def __init__(self, num_steps: Iterator[int]) -> None:
        self._num_steps = num_steps
        self._seen: set[str] = set()
        self._drafters: list[Working] = []

    @property
    def num_ahead_used(self) -> int:
        return sum(drafter.metrics.num_ahead_used for drafter in self._drafters)

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        if any(sequence.id not in self._seen for sequence in sequences):
            schedule = scheduler(FOUR_GUESSED, run_ahead=True, max_batch=1 << 20, max_sequences=1 << 20)
            self._drafters.append(Working(*connected(schedule, target=FOUR_TOKENS), self._num_steps))
            self._seen = {sequence.id for sequence in sequences}
        return self._drafters[-1].propose(sequences)


@pytest.mark.parametrize("k", [1, 2])
def test_the_coupled_law_is_the_targets_with_whatever_was_drafted_ahead(k: int) -> None:
    settings = [SamplingParams(temperature=1.0, max_tokens=100, **kind) for kind in LAWS]
    coupled = [replace(params, verifier="coupled") for params in settings]
    drafter = Renewing(at_random(0, most=4))
    assert_is_law_of_target(coupled_laws(FOUR_TOKENS, drafter, prompt=PROMPT, settings=coupled, k=k), settings)
    assert drafter.num_ahead_used > 20


@pytest.mark.parametrize("verifier", ["rejection", "block"])
def test_what_is_drawn_over_several_rounds_has_the_targets_distribution(verifier: VerifierName) -> None:
    """A sequence of four tokens takes two rounds and more, most of them with drafts made ahead."""
    num_draws, law = 1500, Counter[tuple[int, ...]]()
    drafter = Working(
        *connected(scheduler(FOUR_NEARLY, run_ahead=True, max_batch=1 << 20), target=FOUR_TOKENS), at_random(0, most=4)
    )
    drafter.channel.scheduler.config = replace(drafter.channel.scheduler.config, max_sequences=1 << 20)
    sequences = [
        plain(PROMPT, k=1, temperature=1.0, max_tokens=4, seed=seed, verifier=verifier, allowed_token_ids={0, 1, 2})
        for seed in range(num_draws)
    ]
    for tokens in decode(sequences, drafter, FOUR_TOKENS):
        law[tuple(tokens[len(PROMPT) : len(PROMPT) + LENGTH])] += 1
    assert drafter.metrics.num_ahead_used > num_draws / 2
    expected = target_law(FOUR_TOKENS, PROMPT, sequences[0].params)
    for outcome, chance in expected.items():
        # Five standard deviations: with 27 outcomes, true draws would fail for one seed in 60,000.
        assert abs(law[outcome] / num_draws - chance) <= 5 * (chance * (1 - chance) / num_draws) ** 0.5, outcome
