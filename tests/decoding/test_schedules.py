"""Whatever requests come, in whatever order, and whoever gives up: each gets what it gets alone, and the caches stay sound."""

import random
from dataclasses import replace

import pytest

from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.decoding.drafters import ChainDrafter, ModelDrafter, NoDrafter, PromptLookupDrafter, RoutedDrafter
from specdecode.decoding.engine import Engine, EngineConfig
from specdecode.decoding.loop import generate
from specdecode.decoding.sequence import Route, SamplingParams, Sequence
from specdecode.errors import OverloadedError

NUM_REQUESTS = 36
DRAFTERS = ("model", "early", "lookup", "chain", "none", "unknown", None)
CHANGES = [
    {},
    {"top_p": 0.8},
    {"top_k": 5, "min_p": 0.02},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"logit_bias": {3: 2.0}, "bad_words_ids": ((7,), (3, 4))},
    {"stop_token_ids": range(0, 61, 7), "min_tokens": 1},
    {"allowed_token_ids": range(5, 50), "presence_penalty": 1.0},
    {"logprobs": 1, "prompt_logprobs": 0},
]


@pytest.fixture(scope="module")
def target(target_folder):
    """In float64: of the thousands of tokens here some are as likely as another one up to float32's rounding."""
    return HuggingFaceBackend(target_folder, dtype="float64")


@pytest.fixture(scope="module")
def draft(draft_folder):
    return HuggingFaceBackend(draft_folder, dtype="float64")


class Schedule:
    """An engine with few rows, requests at random, and all that was asked of it."""

    def __init__(self, seed, folders, *, draft_length, is_free_of_k):
        self.rng = random.Random(seed)
        self.target = HuggingFaceBackend(folders[0], dtype="float64", max_rows=self.rng.randint(4, 6), max_length=128)
        self.draft = HuggingFaceBackend(folders[1], dtype="float64", max_rows=self.rng.randint(2, 4), max_length=128)
        config = EngineConfig(
            max_batch=self.rng.randint(3, 4),
            max_queued=4,
            prefill_chunk=self.rng.choice([3, 7, 16]),
            draft_length=draft_length,
        )
        self.engine = Engine(self.target, routed(self.draft), config)
        self.is_free_of_k = is_free_of_k
        self.prefixes = [[self.rng.randrange(61) for _ in range(length)] for length in (60, 45, 30)]
        self.live: list[Sequence] = []
        self.gone: list[tuple[Sequence, list[int]]] = []  # with their prompts
        self.finished: list[tuple[Sequence, list[int]]] = []
        self.cancelled: list[tuple[Sequence, list[int]]] = []
        self.prompts: dict[str, list[int]] = {}
        self.rows_seen: set[str] = set()

    def run(self):
        num_left = NUM_REQUESTS
        while num_left or self.engine.has_work:
            for _ in range(self.rng.choice([0, 0, 1, 1, 2])):
                if num_left:
                    num_left -= self.submit(self.come_back() if self.gone and self.rng.random() < 0.3 else self.join())
            if self.live and self.rng.random() < 0.06:
                self.cancel(self.rng.choice(self.live))
            self.step()

    def join(self):
        """A new request, whose prompt begins as that of others does."""
        prompt = self.rng.choice(self.prefixes)[: self.rng.randint(1, 60)]
        prompt = prompt + [self.rng.randrange(61) for _ in range(self.rng.randint(0, 6))]
        verifiers = ["coupled"] if self.is_free_of_k else ["rejection", "block", "coupled"]
        params = SamplingParams(
            temperature=self.rng.choice([0.0, 0.7, 1.0]),
            verifier=self.rng.choice(verifiers),
            seed=self.rng.randrange(2**64),
            max_tokens=self.rng.randint(1, 16),
            **self.rng.choice(CHANGES),
        )
        return Sequence(prompt, params, Route(self.rng.choice(DRAFTERS), self.rng.randint(0, 6)))

    def come_back(self):
        """A request that was there before, after its row was perhaps taken by another."""
        sequence, prompt = self.rng.choice(self.gone)
        return Sequence(prompt, sequence.params, sequence.route)

    def submit(self, sequence):
        """Whether it is taken on, which it is unless the engine is full."""
        is_full = self.engine.num_queued + self.engine.num_running == 4 + self.engine.config.max_batch
        if is_full:
            with pytest.raises(OverloadedError):
                self.engine.submit(sequence)
            return False
        self.prompts[sequence.id] = list(sequence.tokens)
        self.engine.submit(sequence)
        self.live.append(sequence)
        return True

    def cancel(self, sequence):
        before = self.engine.num_queued + self.engine.num_running
        self.engine.cancel(sequence)
        assert self.engine.num_queued + self.engine.num_running == before - 1
        assert sequence.finish_reason is None
        self.cancelled.append((sequence, list(sequence.tokens)))
        self._leave(sequence)

    def step(self):
        for sequence, round in self.engine.step():
            assert sequence in self.live
            assert sequence.tokens[len(sequence.tokens) - len(round.tokens) :] == round.tokens
            assert round.num_accepted <= round.num_drafted <= sequence.route.k
            if round.finish_reason:
                self.finished.append((sequence, self.prompts[sequence.id]))
                self._leave(sequence)
        for backend in (self.target, self.draft):
            backend.cache.check()
        self.rows_seen |= {memo.id for memo in self.target.cache.rows}
        assert self.engine.num_running <= self.engine.config.max_batch
        assert self.engine.num_queued + self.engine.num_running == len(self.live)

    def _leave(self, sequence):
        self.live.remove(sequence)
        self.gone.append((sequence, self.prompts[sequence.id]))


def routed(draft):
    model = ModelDrafter(draft)
    return RoutedDrafter(
        {
            "model": model,
            "early": ModelDrafter(draft, min_confidence=0.2, support=8),
            "lookup": PromptLookupDrafter(min_ngram=1),
            "chain": ChainDrafter([PromptLookupDrafter(), model]),
            "none": NoDrafter(),
        }
    )


def alone(prompt, params, route, target, draft):
    sequence = Sequence(prompt, params, route)
    for _ in generate([sequence], routed(draft), target):
        pass
    return sequence


@pytest.mark.parametrize(
    ("draft_length", "is_free_of_k", "seed"),
    [("fixed", False, seed) for seed in range(4)] + [("adaptive", True, seed) for seed in range(4, 7)],
)
def test_any_schedule_gives_each_what_it_gets_alone(
    draft_length, is_free_of_k, seed, target_folder, draft_folder, target, draft
):
    """Where the lengths of drafts depend on the time they take, of those whose tokens do not depend on them."""
    schedule = Schedule(seed, (target_folder, draft_folder), draft_length=draft_length, is_free_of_k=is_free_of_k)
    schedule.run()
    assert schedule.engine.num_queued == schedule.engine.num_running == 0
    assert not schedule.live
    assert len(schedule.finished) + len(schedule.cancelled) == NUM_REQUESTS
    for sequence, prompt in schedule.finished:
        expected = alone(prompt, sequence.params, sequence.route, target, draft)
        assert sequence.tokens == expected.tokens
        assert sequence.finish_reason == expected.finish_reason
    for sequence, tokens in schedule.cancelled:
        assert sequence.tokens == tokens  # nothing came after
        expected = alone(schedule.prompts[sequence.id], sequence.params, sequence.route, target, draft)
        assert expected.tokens[: len(tokens)] == tokens
    # What was meant to happen did.
    assert len(schedule.finished) > 15
    assert schedule.cancelled
    assert len(schedule.rows_seen) > 2 * schedule.target.cache.max_rows
    assert len({tuple(prompt) for _, prompt in schedule.gone}) < len(schedule.gone)


@pytest.mark.parametrize("seed", range(3))
def test_more_sequences_than_the_caches_have_rows_are_decoded_together(seed, target_folder, draft_folder, target, draft):
    """An engine that is larger than both caches is slow and right."""
    rng = random.Random(seed)
    few = [
        HuggingFaceBackend(folder, dtype="float64", max_rows=rows, max_length=128)
        for folder, rows in [(target_folder, 2), (draft_folder, 1)]
    ]
    engine = Engine(few[0], routed(few[1]), EngineConfig(max_batch=5, prefill_chunk=9, draft_length="fixed"))
    sequences = [
        Sequence(
            [rng.randrange(61) for _ in range(rng.randint(1, 20))],
            SamplingParams(temperature=rng.choice([0.0, 0.9]), seed=number, max_tokens=rng.randint(2, 10)),
            Route(rng.choice(["model", "chain"]), rng.randint(1, 4)),
        )
        for number in range(8)
    ]
    expected = [alone(s.tokens, s.params, s.route, target, draft).tokens for s in sequences]
    for sequence in sequences:
        engine.submit(sequence)
    while engine.has_work:
        engine.step()
        for backend in few:
            backend.cache.check()
    assert [sequence.tokens for sequence in sequences] == expected


def test_a_cancelled_request_leaves_its_place_to_the_next_in_the_same_step(target, draft):
    engine = Engine(target, ModelDrafter(draft), EngineConfig(max_batch=2, prefill_chunk=64))
    params = SamplingParams(max_tokens=30)
    first, second, third = (Sequence([number, 2, 3], params, Route("model", 2)) for number in range(3))
    for sequence in (first, second, third):
        engine.submit(sequence)
    engine.step()
    assert (engine.num_running, engine.num_queued) == (2, 1)
    engine.cancel(first)
    assert (engine.num_running, engine.num_queued) == (1, 1)
    assert [sequence for sequence, _ in engine.step()] == [second, third]


def test_a_request_that_is_cancelled_and_resubmitted_starts_anew(target, draft):
    engine = Engine(target, ModelDrafter(draft), EngineConfig(max_batch=2, draft_length="fixed"))
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=12)
    expected = alone([1, 2, 3], params, Route("model", 3), target, draft).tokens
    for num_steps in (0, 1, 3):
        cancelled = Sequence([1, 2, 3], replace(params), Route("model", 3))
        engine.submit(cancelled)
        for _ in range(num_steps):
            engine.step()
        engine.cancel(cancelled)
        again = Sequence([1, 2, 3], params, Route("model", 3))
        engine.submit(again)
        list(engine.run())
        assert again.tokens == expected
