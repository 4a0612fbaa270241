"""The output's distribution is the target's, added up exactly."""

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch

from specdecode.backends.table import TableModel, random_table
from specdecode.decoding.constraints import Scored
from specdecode.decoding.distributions import Distributions
from specdecode.decoding.drafters import (
    ChainDrafter,
    ModelDrafter,
    NoDrafter,
    PromptLookupDrafter,
    RoutedDrafter,
)
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.decoding.verification import Block, BlockVerifier, RejectionVerifier, draw
from specdecode.grammar import Grammar
from specdecode.vocabulary import SameVocabulary, SharedTokens
from tests.conftest import EXACTNESS
from tests.decoding.enumeration import coupled_laws, emitted_laws, expected_accepted, largest_difference, target_law

VERIFIERS = [RejectionVerifier(), BlockVerifier()]
PROMPT = [0, 1, 2, 0, 1]
EOS = 3


def setting(**params):
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 100, "ignore_eos": True, **params})


ALONE = [
    setting(),
    setting(temperature=0.0),
    setting(temperature=0.6),
    setting(top_p=0.7),
    setting(top_k=2),
    setting(min_p=0.3),
    setting(repetition_penalty=1.7),
    setting(presence_penalty=1.2),
    setting(frequency_penalty=1.5),
    setting(logit_bias={1: 2.0, 2: -3.0}),
    setting(allowed_token_ids=frozenset({0, 2, 3})),
    setting(bad_words_ids=((1,),)),
    setting(bad_words_ids=((1, 2), (2, 0, 1))),
    setting(ignore_eos=False),
    setting(ignore_eos=False, min_tokens=2),
    setting(stop_token_ids=frozenset({2})),
    setting(stop_token_ids=frozenset({2}), min_tokens=1),
    setting(max_tokens=2),
    setting(grammar=Grammar("regex", "(ab|b)*")),
    setting(grammar=Grammar.choice(["ab", "aba", "bb", "b"]), ignore_eos=False),
]
TOGETHER = [
    setting(temperature=0.7, top_k=3, top_p=0.6),
    setting(temperature=0.8, top_p=0.9, min_p=0.1),
    setting(temperature=1.3, top_k=2, min_p=0.2),
    setting(temperature=0.0, repetition_penalty=1.4),
    setting(temperature=0.0, presence_penalty=2.0, frequency_penalty=1.0, logit_bias={3: 1.5}),
    setting(repetition_penalty=0.6, frequency_penalty=-1.0, top_p=0.8),
    setting(repetition_penalty=1.3, presence_penalty=-0.5, frequency_penalty=0.7, temperature=0.9),
    setting(logit_bias={0: 3.0}, presence_penalty=2.0, top_k=2),
    setting(allowed_token_ids=frozenset({1, 2, 3}), frequency_penalty=2.0, top_p=0.9),
    setting(bad_words_ids=((0, 0), (1,)), top_k=2, temperature=1.5),
    setting(ignore_eos=False, min_tokens=1, repetition_penalty=1.5, top_p=0.85),
    setting(ignore_eos=False, stop_token_ids=frozenset({0}), min_tokens=2, logit_bias={0: 2.0}),
    setting(ignore_eos=False, max_tokens=2, min_tokens=2, allowed_token_ids=frozenset({0, 3}), temperature=0.5),
    setting(grammar=Grammar("regex", "(ab|ba)+"), temperature=0.0),
    setting(grammar=Grammar("regex", "(ab|ba)+"), temperature=0.7, top_p=0.8, ignore_eos=False),
    setting(grammar=Grammar("regex", "(a|b)*"), stop_token_ids=frozenset({1}), repetition_penalty=1.3, min_p=0.1),
    setting(
        temperature=0.8,
        top_p=0.9,
        top_k=3,
        min_p=0.05,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={2: 1.0},
        bad_words_ids=((2, 2),),
        ignore_eos=False,
        min_tokens=1,
    ),
]


@cache
def table(vocab_size: int, seed: int) -> TableModel:
    return TableModel(cache(random_table(vocab_size, seed, order=2, sharpness=1.5)), eos_token_ids=[EOS])


def other_vocabulary(support: int) -> ModelDrafter:
    """A draft of five tokens, of which the target has three, under other ids; it spells the target's 1 with two tokens."""
    shared = SharedTokens(
        torch.tensor([4, 1, 2]), torch.tensor([0, 2, 3]), 4, lambda token, _: {0: [4], 1: [0, 3], 2: [1], 3: [2]}[token]
    )
    return ModelDrafter(table(5, 11), shared, support=support)


def model(support: int = 64, **options) -> ModelDrafter:
    return ModelDrafter(table(4, 1), support=support, **options)


class RunsAhead:
    """A drafter that goes on from the end of its drafts, of all or of some."""

    def __init__(self, drafter, is_willing=bool):
        self.drafter = drafter
        self.is_willing = is_willing

    def propose(self, sequences):
        return [replace(d, continues=bool(d.tokens and self.is_willing(d.tokens))) for d in self.drafter.propose(sequences)]


class ChangesArms:
    """Several drafters, of which the tokens so far choose one: as where an arm that disappoints is left for another."""

    def __init__(self, *drafters):
        self.drafters = drafters

    def propose(self, sequences):
        return [self.drafters[sum(s.tokens) % len(self.drafters)].propose([s])[0] for s in sequences]


# By the most tokens that any q may cover.
DRAFTERS = {
    "none": lambda _: NoDrafter(),
    "model": model,
    "model, one-token q": lambda _: model(1),
    "model, ends early": lambda support: model(support, min_confidence=0.3),
    "model, fewer tokens": lambda support: ModelDrafter(table(3, 5), SameVocabulary(3, 4), support=support),
    "other tokenizer": other_vocabulary,
    "prompt lookup": lambda _: PromptLookupDrafter(max_ngram=2, min_ngram=1),
    "lookup, then model": lambda support: ChainDrafter([PromptLookupDrafter(max_ngram=3, min_ngram=2), model(support)]),
    "runs ahead": lambda support: RunsAhead(model(support)),
    "runs ahead at times": lambda support: RunsAhead(model(support, min_confidence=0.2), lambda tokens: tokens[-1] % 2),
    "changes arms": lambda support: ChangesArms(model(support), ModelDrafter(table(4, 7), support=support), NoDrafter()),
    "routed": lambda support: RoutedDrafter({"other": NoDrafter(), "draft": model(support)}),
}
CERTAIN = {"none", "model, one-token q", "prompt lookup"}


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("name", DRAFTERS)
def test_the_emitted_law_is_the_targets(name, k):
    """Every verifier and drafter, every sampling parameter alone and many together, the probability of every sequence."""
    target, settings = table(4, 0), ALONE + TOGETHER
    support = 1 if name in CERTAIN else [4, 4, 4, 3, 2][k]  # of the 4^k drafts, fewer where they are too many to follow
    drafter = DRAFTERS[name](support)
    laws = emitted_laws(target, drafter, VERIFIERS, prompt=PROMPT, settings=settings, k=k, num_choices=support)
    coupled = [replace(params, verifier="coupled") for params in settings]
    laws.append(coupled_laws(target, drafter, prompt=PROMPT, settings=coupled, k=k))
    expected = [target_law(target, PROMPT, params) for params in settings]
    for verifier, of_verifier in zip(["rejection", "block", "coupled"], laws, strict=True):
        for params, emitted, law in zip(settings, of_verifier, expected, strict=True):
            assert sum(law.values()) == pytest.approx(1, abs=1e-12)
            difference = largest_difference(emitted, law)
            assert difference < 1e-9, (verifier, params)
            num_settings, num_sequences, largest = EXACTNESS[verifier, name, k]
            EXACTNESS[verifier, name, k] = (num_settings + 1, num_sequences + len(law), max(largest, difference))


class ResamplesFromTarget(RejectionVerifier):
    def emission(self, block, lengths):
        return block.p.candidates(block.first + lengths)


class AcceptsByTargetAlone(RejectionVerifier):
    def reach(self, block):
        return block.p_drafted().cumprod(-1)


class AcceptsEverything(RejectionVerifier):
    def reach(self, block):
        return torch.ones_like(block.q_drafted())


class ForgetsEarlierRejections(RejectionVerifier):
    def reach(self, block):
        return (block.p_drafted() / block.q_drafted()).clamp(max=1).cummin(-1).values


class BelievesAFlatterQ(RejectionVerifier):
    def reach(self, block):
        return super().reach(_flatter(block))

    def emission(self, block, lengths):
        return super().emission(_flatter(block), lengths)


def _flatter(block):
    return replace(block, q=0.9 * block.q + 0.1 / block.q.shape[2])


@pytest.mark.parametrize(
    ("verifier", "k"),
    [
        (ResamplesFromTarget(), 1),
        (AcceptsByTargetAlone(), 1),
        (AcceptsEverything(), 1),
        (ForgetsEarlierRejections(), 2),
        (BelievesAFlatterQ(), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_wrong_verifier_is_caught(verifier, k):
    target, params = table(4, 0), setting()
    ((emitted,),) = emitted_laws(target, model(), [verifier], prompt=PROMPT, settings=[params], k=k, num_choices=4)
    assert sum(emitted.values()) == pytest.approx(1)
    assert largest_difference(emitted, target_law(target, PROMPT, params)) > 1e-3


class DropsUnlikelyTokens:
    """Takes back the last token of a draft that turned out unlikely, so that q is not what the others were drawn from."""

    def propose(self, sequences):
        drafts = model().propose(sequences)
        return [d if d.q[-1][d.support[-1] == d.tokens[-1]] > 0.3 else Draft.empty() for d in drafts]


def test_a_draft_that_takes_tokens_back_is_caught():
    # The helper that follows every draft adds their reported probabilities up, which must give 1.
    with pytest.raises(AssertionError):
        emitted_laws(table(4, 0), DropsUnlikelyTokens(), VERIFIERS, prompt=PROMPT, settings=[setting()], k=1, num_choices=4)


@pytest.mark.parametrize(
    "options",
    [{"frequency_penalty": 1.5}, {"bad_words_ids": ((1, 2), (2, 0))}, {"grammar": Grammar("regex", "(ab|ba|bbb)*")}],
    ids=lambda options: next(iter(options)),
)
def test_constraints_that_do_not_see_drafted_tokens_are_caught(options, monkeypatch):
    from specdecode.decoding import constraints

    params, target = setting(**options), table(4, 0)
    expected = target_law(target, PROMPT, params)
    for name in ("_bans", "_penalties", "_grammatical"):
        seeing = getattr(constraints, name)
        monkeypatch.setattr(constraints, name, lambda part, *rest, f=seeing: f(_blind(part), *rest))
    ((emitted,),) = emitted_laws(target, model(), [RejectionVerifier()], prompt=PROMPT, settings=[params], k=2, num_choices=4)
    assert largest_difference(emitted, expected) > 1e-3


def _blind(part):
    return replace(part, drafted=[part.sequence.tokens[0]] * len(part.drafted)) if part.drafted else part


def distributions(log_p):
    rows = [Scored(Sequence([0], SamplingParams(temperature=1.0)), [], 1)] * len(log_p)
    return Distributions.of(log_p, rows, frozenset())


def random_draft(k, *, vocab_size=5, seed=0):
    """A draft beside the target's log-probabilities at its positions, [k + 1, vocab]."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(k, 3, generator=generator, dtype=torch.float64)
    support = (
        torch.stack([torch.randperm(vocab_size, generator=generator)[:3] for _ in range(k)]) if k else torch.empty(0, 3).long()
    )
    p = torch.rand(k + 1, vocab_size, generator=generator, dtype=torch.float64)
    draft = Draft(support[:, 1].tolist(), support, q / q.sum(-1, keepdim=True))
    return draft, (p / p.sum(-1, keepdim=True)).log()


@pytest.mark.parametrize("verifier", VERIFIERS, ids=lambda verifier: type(verifier).__name__)
def test_the_law_of_a_ragged_batch_is_that_of_each_draft_alone(verifier):
    pairs = [random_draft(k, seed=k) for k in (2, 0, 4, 1)]
    batch = Block.of([draft for draft, _ in pairs], distributions(torch.cat([log_p for _, log_p in pairs])))
    for index, (draft, log_p) in enumerate(pairs):
        k, alone = len(draft.tokens), Block.of([draft], distributions(log_p))
        torch.testing.assert_close(verifier.reach(batch)[index, :k], verifier.reach(alone)[0])
        assert verifier.reach(batch)[index, k:].eq(0).all()
        for length in range(k + 1):
            lengths = torch.tensor([min(length, len(other.tokens)) for other, _ in pairs])
            tokens, weights = (column[index] for column in verifier.emission(batch, lengths))
            alone_tokens, alone_weights = (column[0] for column in verifier.emission(alone, torch.tensor([length])))
            assert torch.equal(tokens, alone_tokens)
            torch.testing.assert_close(weights, alone_weights)


def test_block_verification_accepts_no_less_than_rejection_and_sometimes_more():
    gains = []
    for seed in range(8):
        target, drafter = table(4, 2 * seed), ModelDrafter(table(4, 2 * seed + 1))
        sequence = Sequence([0, 1], setting(), Route("draft", 3))
        rejection, block = (expected_accepted(target, drafter, verifier, sequence, 4) for verifier in VERIFIERS)
        gains.append(block - rejection)
    assert min(gains) > -1e-12
    assert max(gains) > 0.01


@pytest.mark.parametrize("verifier", VERIFIERS, ids=lambda verifier: type(verifier).__name__)
def test_the_law_is_what_is_drawn_from(verifier):
    num_draws, (draft, log_p) = 20_000, random_draft(3)
    block = Block.of([draft] * num_draws, distributions(log_p.repeat(num_draws, 1)))
    sequences = [Sequence([0] * (1 + seed % 7), setting(seed=seed), Route("draft", 3)) for seed in range(num_draws)]
    counts = Counter(zip(*draw(verifier, block, sequences), strict=True))
    reach = [1.0, *verifier.reach(block)[0].tolist(), 0.0]
    for length in range(4):
        tokens, weights = (column[0] for column in verifier.emission(block, torch.full((num_draws,), length)))
        for token, share in zip(tokens.tolist(), (weights / weights.sum()).tolist(), strict=True):
            chance = (reach[length] - reach[length + 1]) * share
            # Five standard deviations: with the 20 outcomes, true draws would fail for one seed in 80,000.
            bound = 5 * (chance * (1 - chance) / num_draws) ** 0.5
            assert abs(counts[length, token] / num_draws - chance) <= bound
