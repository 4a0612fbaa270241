"""Under coupled verification a seed says which tokens come, whoever drafts, however many, with whatever company."""

import random
from dataclasses import replace
from functools import cache

import pytest
import torch

from specdecode.backends.backend import Row
from specdecode.backends.table import TableModel, random_table
from specdecode.decoding.drafters import ChainDrafter, ModelDrafter, NoDrafter, PromptLookupDrafter, RoutedDrafter
from specdecode.decoding.engine import Engine, EngineConfig
from specdecode.decoding.loop import generate, speculative_decode, step
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.vocabulary import SharedTokens

VOCAB_SIZE, NUM_TOKENS = 61, 20
PROMPT = [5, 40, 3, 17, 28, 5, 40]
SETTINGS = [
    SamplingParams(temperature=0.8, verifier="coupled", seed=seed, max_tokens=NUM_TOKENS, **changes)
    for seed, changes in enumerate(
        [
            {},
            {"top_p": 0.7},
            {"min_p": 0.15},
            {"top_k": 4, "top_p": 0.9},
            {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.8},
            {"frequency_penalty": -1.0, "min_p": 0.05, "logit_bias": {3: 2.0, 40: 1.0}},
            {"allowed_token_ids": range(30), "bad_words_ids": ((3,), (5, 7), (7, 5))},
            {"stop_token_ids": range(0, 60, 4), "min_tokens": 8, "repetition_penalty": 1.2},
        ]
    )
]
K = range(7)


def under_other_ids(backend):
    """The same model with another tokenizer: token t is 2 t, modulo the vocabulary, and nine tokens are not shared."""
    ours = [2 * token % VOCAB_SIZE for token in range(VOCAB_SIZE)]
    theirs = [ours.index(token) for token in range(VOCAB_SIZE)]

    def distribution(tokens):
        row = Row("renamed", [theirs[token] for token in tokens] or [0], 1)
        return backend.logits([row])[0].double().softmax(-1)[theirs]

    shared = range(52)
    translation = SharedTokens(
        torch.tensor([ours[token] for token in shared]),
        torch.tensor(shared),
        VOCAB_SIZE,
        lambda token, _: [ours[token]],
    )
    return ModelDrafter(TableModel(distribution), translation)


def make_drafters(target, draft):
    return {
        "none": NoDrafter(),
        "model": ModelDrafter(draft),
        "another model": ModelDrafter(TableModel(random_table(VOCAB_SIZE, 3, sharpness=3.0))),
        "the target": ModelDrafter(target),
        "model, few tokens": ModelDrafter(draft, support=3),
        "model, ends early": ModelDrafter(draft, min_confidence=0.2),
        "prompt lookup": PromptLookupDrafter(max_ngram=3, min_ngram=1),
        "chain": ChainDrafter([PromptLookupDrafter(min_ngram=1), ModelDrafter(draft)]),
        "routed": RoutedDrafter({"other": NoDrafter(), "draft": ModelDrafter(draft)}),
        "another tokenizer": under_other_ids(draft),
    }


@pytest.fixture(scope="module")
def expected(target):
    """What the target alone generates under each of the settings, one at a time."""
    return [plain(target, PROMPT, params) for params in SETTINGS]


@pytest.fixture(scope="module")
def drafters(target, draft):
    return make_drafters(target, draft)


def plain(target, prompt, params):
    sequence = Sequence(prompt, params)
    while sequence.finish_reason is None:
        step([sequence], NoDrafter(), target)
    return sequence.tokens


def sequences_of(settings, k=4, drafter="draft"):
    return [Sequence(PROMPT, params, Route(drafter, k)) for params in settings]


def decoded(sequences, drafter, target):
    for _ in generate(sequences, drafter, target):
        pass
    return [sequence.tokens for sequence in sequences]


def test_seeds_and_settings_make_a_difference(expected, target):
    assert len({tuple(tokens) for tokens in expected}) == len(SETTINGS)
    assert plain(target, PROMPT, replace(SETTINGS[0], seed=100)) != expected[0]


@pytest.mark.parametrize(
    "name",
    [
        "none",
        "model",
        "another model",
        "the target",
        "model, few tokens",
        "model, ends early",
        "prompt lookup",
        "chain",
        "routed",
        "another tokenizer",
    ],
)
def test_no_drafter_and_no_length_changes_a_token(name, drafters, expected, target):
    """All lengths are decoded together, each next to others."""
    sequences = [sequence for k in K for sequence in sequences_of(SETTINGS, k)]
    assert decoded(sequences, drafters[name], target) == expected * len(K)


@pytest.mark.parametrize("name", ["model", "chain", "another tokenizer"])
def test_alone_is_as_together(name, drafters, expected, target):
    for number, params in enumerate(SETTINGS):
        sequences = sequences_of([params], k=1 + number % 6)
        assert decoded(sequences, drafters[name], target) == [expected[number]]


def test_tables_agree_too():
    target, draft = (TableModel(cache(random_table(9, seed))) for seed in range(2))
    params = replace(SETTINGS[0], max_tokens=25)
    for settings in (params, replace(params, top_p=0.8), replace(params, repetition_penalty=1.3, min_p=0.1)):
        alone = plain(target, [1, 2, 1], settings)
        for drafter in (draft, target, PromptLookupDrafter(min_ngram=1), ModelDrafter(draft, support=2)):
            for k in K:
                output, _ = speculative_decode(
                    target,
                    drafter,
                    torch.tensor([[1, 2, 1]]),
                    25,
                    k,
                    temperature=0.8,
                    verifier="coupled",
                    seed=settings.seed,
                    top_p=settings.top_p,
                    min_p=settings.min_p,
                    repetition_penalty=settings.repetition_penalty,
                )
                assert output[0].tolist() == alone


def test_a_draft_that_is_the_target_is_always_right(target):
    for params in SETTINGS:
        sequence = Sequence(PROMPT, params, Route("draft", 5))
        for results in generate([sequence], ModelDrafter(target), target):
            for _, round in results:
                assert round.num_accepted == round.num_drafted


def test_a_draft_under_other_ids_guesses_as_well_as_under_its_own(draft, target):
    """But for the tokens that are not shared, the noise that both draw with is the same."""
    accepted = []
    for drafter in (ModelDrafter(draft), under_other_ids(draft)):
        allowed = replace(SETTINGS[0], allowed_token_ids=range(52), max_tokens=40)
        sequence = Sequence(PROMPT, allowed, Route("draft", 4))
        accepted.append(sum(round.num_accepted for results in generate([sequence], drafter, target) for _, round in results))
    assert accepted[0] == accepted[1] > 0


# What changes on the way


@pytest.mark.parametrize("seed", range(4))
def test_drafts_may_be_switched_between_any_two_rounds(seed, drafters, expected, target):
    rng, names = random.Random(seed), [*drafters, "nobody", None]
    sequences = sequences_of(SETTINGS)
    routed = RoutedDrafter(drafters)
    while unfinished := [sequence for sequence in sequences if sequence.finish_reason is None]:
        for sequence in unfinished:
            if rng.random() < 0.5:
                sequence.route = Route(rng.choice(names), rng.randint(0, 6))
                sequence.k = sequence.route.k
        step(unfinished, routed, target)
    assert [sequence.tokens for sequence in sequences] == expected


class Unreliable:
    """Another drafter, of whose drafts some do not come and some come short."""

    def __init__(self, drafter, rng):
        self._drafter, self._rng = drafter, rng
        self.num_failures = 0

    def propose(self, sequences):
        return [self._some(draft) for draft in self._drafter.propose(sequences)]

    def _some(self, draft):
        if self._rng.random() < 0.4:
            self.num_failures += 1
            return Draft.empty()
        return draft.truncate(self._rng.randint(0, 6))


@pytest.mark.parametrize("name", ["model", "chain", "another tokenizer"])
def test_a_drafter_may_fail_in_any_round(name, drafters, expected, target):
    drafter = Unreliable(drafters[name], random.Random(0))
    assert decoded(sequences_of(SETTINGS), drafter, target) == expected
    assert drafter.num_failures > 20


@pytest.mark.parametrize("name", ["model", "the target", "prompt lookup"])
def test_the_length_may_change_in_any_round(name, drafters, expected, target):
    rng, sequences = random.Random(1), sequences_of(SETTINGS, k=6)
    while unfinished := [sequence for sequence in sequences if sequence.finish_reason is None]:
        for sequence in unfinished:
            sequence.k = rng.randint(0, 6)
        step(unfinished, drafters[name], target)
    assert [sequence.tokens for sequence in sequences] == expected


@pytest.mark.parametrize("draft_length", ["adaptive", "fixed"])
def test_others_come_and_go_in_an_engine(draft_length, drafters, expected, target):
    rng, sequences = random.Random(2), sequences_of(SETTINGS, k=5)
    others = [
        Sequence([rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 40))], params, Route("draft", rng.randint(0, 6)))
        for number in range(10)
        for params in [SamplingParams(temperature=rng.choice([0.0, 1.0]), max_tokens=rng.randint(1, 25), seed=number)]
    ]
    waiting = rng.sample(sequences + others, len(sequences + others))
    engine = Engine(target, drafters["model"], EngineConfig(max_batch=5, prefill_chunk=8, draft_length=draft_length))
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.6:
            engine.submit(waiting.pop())
        if rng.random() < 0.1:
            engine.cancel(rng.choice(others))
        engine.step()
    assert [sequence.tokens for sequence in sequences] == expected


@pytest.mark.parametrize("name", ["none", "model", "another tokenizer"])
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_a_sequence_goes_on_from_any_prefix(name, number, drafters, expected, target):
    """Not only from a round's border: elsewhere, rounds may have had other ones."""
    tokens = expected[number]
    resumed = [
        Sequence(tokens[:length], SETTINGS[number], Route("draft", 3), num_prompt_tokens=len(PROMPT))
        for length in range(len(PROMPT), len(tokens))
    ]
    assert [sequence.num_generated for sequence in resumed] == list(range(len(resumed)))
    assert decoded(resumed, drafters[name], target) == [tokens] * len(resumed)
    assert len({sequence.finish_reason for sequence in resumed}) == 1


# Other verifiers beside it


def mixed_sequences():
    """All verifiers and greedy decoding in turn, each with the parameters of each of the settings."""
    return [
        Sequence(PROMPT[: 2 + number % 5], replace(params, max_tokens=12, **changes), Route("draft", 1 + number % 6))
        for number, params in enumerate(SETTINGS)
        for changes in ({"verifier": "rejection"}, {"verifier": "block"}, {"verifier": "coupled"}, {"temperature": 0.0})
    ]


@pytest.mark.parametrize("name", ["chain", "another tokenizer"])
def test_each_gets_beside_other_verifiers_what_it_gets_alone(name, drafters, target):
    together = mixed_sequences()
    decoded(together, drafters[name], target)
    alone = [decoded([sequence], drafters[name], target)[0] for sequence in mixed_sequences()]
    assert [sequence.tokens for sequence in together] == alone


@pytest.mark.parametrize("verifier", ["rejection", "block", "coupled"])
def test_greedy_tokens_do_not_depend_on_the_verifier(verifier, drafters, target):
    greedy = [replace(params, temperature=0.0, verifier=verifier) for params in SETTINGS]
    without = [plain(target, PROMPT, replace(params, verifier="rejection")) for params in greedy]
    assert decoded(sequences_of(greedy), drafters["model"], target) == without
