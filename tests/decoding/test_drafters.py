"""Guesses are what their makers say they are, and end where there is no more to guess."""

import math
import random
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.table import TableModel, random_table
from specdecode.decoding.drafters import ChainDrafter, ModelDrafter, NoDrafter, PromptLookupDrafter, RoutedDrafter
from specdecode.decoding.loop import as_drafter, speculative_decode
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.errors import RequestError
from specdecode.text import Tokenizer
from specdecode.vocabulary import SharedTokens, Vocabulary
from tests.decoding.recording import RecordingBackend, counting_model


def sequence(tokens, k=4, drafter="draft", **params):
    return Sequence(tokens, SamplingParams(**{"max_tokens": 100, "seed": 0, **params}), Route(drafter, k))


def guess(drafter, tokens, k=4, **params):
    """The only draft for the only sequence."""
    (draft,) = drafter.propose([sequence(tokens, k, **params)])
    return draft


# Prompt lookup


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 1, 2], [3, 4, 5, 6]),
        ([9, 2, 3, 8, 1, 2, 4, 4, 4, 1, 2], [4, 4, 4, 1]),  # of two tokens, not of the one before
        ([5, 1, 2, 3, 6, 0, 9, 2, 3, 7, 0, 0, 5, 1, 2, 3], [6, 0, 9, 2]),  # four tokens are better than a later two
        ([1, 2, 7, 7, 7, 1, 2, 8, 8, 8, 1, 2], [8, 8, 8, 1]),  # the latest of two places
        ([4, 4], []),  # nothing follows the first one that would be two long
        ([4, 4, 4], [4, 4, 4, 4]),
        ([0, 1, 0, 1], [0, 1, 0, 1]),  # past its own end
        ([9, 0, 1, 2, 0, 1], [2, 0, 1, 2]),
        ([0, 1, 2, 3], []),
        ([1, 2, 3, 2], []),  # one token is too little
        ([7], []),
    ],
)
def test_prompt_lookup_copies_what_followed_the_longest_match(tokens, expected):
    draft = guess(PromptLookupDrafter(max_ngram=4, min_ngram=2), tokens)
    assert draft.tokens == expected
    assert draft.q.eq(1).all() and draft.support.squeeze(-1).tolist() == expected


def looked_up(tokens, max_ngram, min_ngram, count):
    """The slow and obvious way, token by token."""
    for n in range(max_ngram, min_ngram - 1, -1):
        places = [end for end in range(n, len(tokens)) if tokens[end - n : end] == tokens[len(tokens) - n :]]
        if places and n < len(tokens):
            copied = list(tokens)
            for offset in range(count):
                copied.append(copied[places[-1] + offset])
            return copied[len(tokens) :]
    return []


@pytest.mark.parametrize("min_ngram", [1, 2, 3])
@pytest.mark.parametrize("max_ngram", [3, 5])
def test_prompt_lookup_equals_a_slow_reference(max_ngram, min_ngram):
    rng, num_found = random.Random(0), 0
    drafter = PromptLookupDrafter(max_ngram, min_ngram)
    for _ in range(300):
        tokens = [rng.randrange(3) for _ in range(rng.randint(1, 25))]
        k = rng.randint(1, 9)
        draft = guess(drafter, tokens, k)
        assert draft.tokens == looked_up(tokens, max_ngram, min_ngram, k)
        num_found += bool(draft.tokens)
    assert num_found > 80


@pytest.mark.parametrize(("k", "max_tokens", "expected"), [(0, 9, 0), (3, 9, 3), (8, 9, 8), (8, 4, 3), (8, 1, 0)])
def test_prompt_lookup_drafts_as_many_as_are_wanted(k, max_tokens, expected):
    assert len(guess(PromptLookupDrafter(), [1, 2, 1, 2], k, max_tokens=max_tokens).tokens) == expected


@pytest.mark.parametrize(("max_ngram", "min_ngram"), [(2, 3), (2, 0), (0, 0), (4, -1)])
def test_impossible_ngrams_are_refused(max_ngram, min_ngram):
    with pytest.raises(RequestError, match=f"got {min_ngram} with max_ngram {max_ngram}"):
        PromptLookupDrafter(max_ngram, min_ngram)


def test_prompt_lookup_speeds_a_repeating_text_up():
    output, metrics = speculative_decode(counting_model(5), PromptLookupDrafter(), torch.tensor([[0, 1]]), 40, K=4)
    assert output[0].tolist() == [number % 5 for number in range(42)]
    assert metrics.num_target_passes < 15


# Drafters made of drafters


class Asked:
    """Drafts the same tokens for whoever is not left out, and remembers whom it was asked for."""

    def __init__(self, tokens, left_out=()):
        self._tokens, self._left_out = tokens, left_out
        self.asked = []

    def propose(self, sequences):
        self.asked.append(list(sequences))
        return [Draft.empty() if s in self._left_out else Draft.certain(self._tokens) for s in sequences]


def test_a_chain_asks_the_next_only_for_what_is_left():
    sequences = [sequence([number]) for number in range(4)]
    first, second = Asked([1], left_out=sequences[1:]), Asked([2], left_out=sequences[2:])
    third = Asked([3], left_out=sequences[3:])
    drafts = ChainDrafter([first, second, third]).propose(sequences)
    assert [draft.tokens for draft in drafts] == [[1], [2], [3], []]
    assert [drafter.asked for drafter in (first, second, third)] == [[sequences], [sequences[1:]], [sequences[2:]]]


def test_a_chain_that_is_satisfied_asks_no_further():
    first, second = Asked([1]), Asked([2])
    ChainDrafter([first, second]).propose([sequence([0])])
    assert second.asked == []


def test_a_chain_of_nothing_drafts_nothing():
    assert [draft.tokens for draft in ChainDrafter([]).propose([sequence([0])] * 2)] == [[], []]


def test_a_chain_of_lookup_and_model_drafts_what_either_does_alone(draft):
    repeating, new = sequence([1, 2, 3, 1, 2]), sequence([1, 2, 3, 4, 5])
    drafts = ChainDrafter([PromptLookupDrafter(), ModelDrafter(draft)]).propose([repeating, new])
    assert drafts[0].tokens == [3, 1, 2, 3]
    assert drafts[1].tokens == guess(ModelDrafter(draft), [1, 2, 3, 4, 5]).tokens


def test_a_route_leads_to_its_drafter_and_to_no_other():
    sequences = [sequence([0], drafter=name, k=k) for name, k in [("a", 2), ("b", 2), ("c", 2), (None, 2), ("a", 0)]]
    one, other = Asked([1]), Asked([2])
    drafts = RoutedDrafter({"a": one, "b": other, "d": NoDrafter()}).propose(sequences)
    assert [draft.tokens for draft in drafts] == [[1], [2], [], [], []]
    assert (one.asked, other.asked) == ([sequences[:1]], [sequences[1:2]])


# Models: where a draft ends


def counted(start=0, k=8, drafter=None, **params):
    return guess(drafter or ModelDrafter(counting_model()), [start], k, **params).tokens


def test_a_draft_ends_at_the_targets_end_token():
    drafter = ModelDrafter(counting_model(eos_token_ids=[2]), eos_token_ids=frozenset({4}))
    assert counted(drafter=drafter) == [1, 2, 3, 4]  # the draft model's own end is not the target's
    assert counted(drafter=drafter, ignore_eos=True) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert counted(drafter=ModelDrafter(counting_model(eos_token_ids=[2]))) == [1, 2]


def test_a_draft_ends_at_a_stop_token_even_where_the_end_token_is_ignored():
    drafter = ModelDrafter(counting_model(), eos_token_ids=frozenset({2}))
    assert counted(drafter=drafter, stop_token_ids={5}, ignore_eos=True) == [1, 2, 3, 4, 5]
    assert counted(drafter=drafter, stop_token_ids={1}) == [1]


def test_no_more_is_drafted_than_is_wanted():
    assert [len(counted(k=k)) for k in range(5)] == list(range(5))
    assert [len(counted(max_tokens=count)) for count in (1, 2, 5, 20)] == [0, 1, 4, 8]


def fading_model(*confidences):
    """A model that counts from 0, and is less sure of some numbers; else it says the number after."""

    def distribution(tokens):
        p = torch.zeros(10, dtype=torch.float64)
        place = tokens[-1] if tokens else 0
        sure = confidences[place] if place < len(confidences) else 1.0
        p[(place + 1) % 10], p[(place + 2) % 10] = sure, 1 - sure
        return p

    return TableModel(distribution)


@pytest.mark.parametrize(
    ("min_confidence", "expected"),
    [
        (0.0, [1, 2, 3, 4, 5, 6]),
        (0.1, [1, 2, 3, 4, 5, 6]),
        (0.5, [1, 2, 3, 4]),  # 0.9 * 0.9 * 0.8 = 0.648, * 0.6 = 0.389
        (0.7, [1, 2, 3]),
        (0.85, [1, 2]),
        (0.95, [1]),
        (1.0, [1]),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1e-3])
def test_a_draft_ends_after_the_token_that_makes_it_unsure(min_confidence, expected, temperature):
    """That token stays: what q said of it would not be true if it could be taken back."""
    drafter = ModelDrafter(fading_model(0.9, 0.9, 0.8, 0.6), min_confidence=min_confidence)
    assert guess(drafter, [0], 6, temperature=temperature).tokens == expected


def test_confidence_is_the_models_own_whatever_the_request_asks_for():
    drafter = ModelDrafter(fading_model(0.9, 0.9, 0.8, 0.6), min_confidence=0.5)
    assert guess(drafter, [0], 6, temperature=0.0, logit_bias={2: 50.0, 3: -9.0}).tokens[:1] == [2]
    (first, second) = drafter.propose([sequence([0], 6), sequence([2], 6)])
    assert (first.tokens, second.tokens) == ([1, 2, 3, 4], [3, 4])  # 0.8 * 0.6; each by itself


@pytest.mark.parametrize("min_confidence", [0.05, 0.3])
def test_an_early_end_takes_no_token_back(min_confidence, draft):
    """The draft is a beginning of the one that does not end early, q included."""
    sequences = [sequence([5, number], 6, temperature=0.9, seed=number) for number in range(20)]
    whole = ModelDrafter(draft).propose(sequences)
    early = ModelDrafter(draft, min_confidence=min_confidence).propose(sequences)
    lengths = {len(draft.tokens) for draft in early}
    assert min(lengths) >= 1 and len(lengths) > 1
    for short, long in zip(early, whole, strict=True):
        count = len(short.tokens)
        assert short.tokens == long.tokens[:count]
        torch.testing.assert_close(short.q, long.q[:count])
        assert torch.equal(short.support, long.support[:count])


def test_a_draft_stops_asking_the_model_when_it_is_complete():
    model = RecordingBackend(counting_model())
    drafter = ModelDrafter(model, eos_token_ids=frozenset({2}))
    drafter.propose([sequence([0], 8), sequence([1], 8), sequence([5], 3)])
    assert [len(rows) for rows in model.calls] == [3, 2, 1]


# Models: what a draft says of itself


@pytest.mark.parametrize(("support", "width"), [(1, 1), (3, 3), (16, 16), (61, 61), (500, 61)])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.6}, {"top_k": 2, "min_p": 0.1}, {"frequency_penalty": 1.0}])
def test_q_is_a_distribution_of_the_promised_width(support, width, params, draft):
    guessed = guess(ModelDrafter(draft, support=support), [5, 40, 3], 5, temperature=0.9, **params)
    assert guessed.q.shape == guessed.support.shape == (5, width)
    torch.testing.assert_close(guessed.q.sum(-1), torch.ones(5))
    for token, support_row, q_row in zip(guessed.tokens, guessed.support, guessed.q, strict=True):
        assert len(set(support_row.tolist())) == width
        assert q_row[support_row == token].item() > 0


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "verifier": "coupled"}], ids=["greedy", "coupled"])
def test_what_is_not_drawn_is_certain(params, draft):
    guessed = guess(ModelDrafter(draft), [5, 40, 3], 5, **params)
    assert guessed.q.tolist() == [[1.0]] * 5
    assert guessed.support.squeeze(-1).tolist() == guessed.tokens


def q_by_hand(model, tokens, num_prompt_tokens, params):
    """The distribution after some tokens, of all tokens, written down as in the textbooks."""
    logits = model.logits_of(tokens)
    output = tokens[num_prompt_tokens:]
    weights = []
    for token, logit in enumerate(logits):
        value = logit + params.get("logit_bias", {}).get(token, 0.0)
        if token in tokens:
            penalty = params.get("repetition_penalty", 1.0)
            value = value / penalty if value > 0 else value * penalty
        value -= params.get("frequency_penalty", 0.0) * output.count(token)
        value -= params.get("presence_penalty", 0.0) * (token in output)
        if any([*tokens, token][-len(word) :] == list(word) for word in params.get("bad_words_ids", ())):
            value = -math.inf
        if len(output) < params.get("min_tokens", 0) and token in params.get("stop_token_ids", ()):
            value = -math.inf
        weights.append(math.exp(value / params["temperature"]))
    return [weight / sum(weights) for weight in weights]


class Readable(TableModel):
    def logits_of(self, tokens):
        return self._distribution(tuple(tokens)).log().tolist()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"repetition_penalty": 1.8},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 0.5, "presence_penalty": -1.0, "frequency_penalty": 1.0, "logit_bias": {2: 1.5}},
        {"bad_words_ids": ((1,), (2, 3), (3, 3, 4), (0, 5))},
        {"min_tokens": 5, "stop_token_ids": (0, 4)},
    ],
)
def test_q_is_that_of_the_model_with_the_drafted_tokens_before_it(params):
    """A penalised token is penalised once more for each time that it is drafted; a bad word may begin in the draft."""
    model, prompt = Readable(random_table(6, 0)), [0, 3, 3]
    params = {"temperature": 0.8, **params}
    for seed in range(20):
        begun = sequence(prompt, 6, **params | {"seed": seed})
        begun.tokens += [2, 5]  # two that are accepted
        (draft,) = ModelDrafter(model, eos_token_ids=frozenset()).propose([begun])
        assert draft.tokens
        for offset in range(len(draft.tokens)):
            expected = q_by_hand(model, begun.tokens + draft.tokens[:offset], len(prompt), params)
            q = torch.zeros(6, dtype=torch.float64).index_add_(0, draft.support[offset], draft.q[offset].double())
            torch.testing.assert_close(q, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=1e-5)


def test_drafted_tokens_follow_q():
    """Over many seeds, the first two tokens come as often as their q says."""
    model, num_seeds = Readable(cache(random_table(4, 0))), 10_000
    sequences = [sequence([1], 2, temperature=1.0, seed=seed) for seed in range(num_seeds)]
    drafts = ModelDrafter(model).propose(sequences)
    pairs = [tuple(draft.tokens) for draft in drafts]
    first = q_by_hand(model, [1], 1, {"temperature": 1.0})
    for a in range(4):
        second = q_by_hand(model, [1, a], 1, {"temperature": 1.0})
        for b in range(4):
            chance = first[a] * second[b]
            # Five standard deviations: with 16 outcomes, true draws would fail for one seed in 100,000.
            bound = 5 * (chance * (1 - chance) / num_seeds) ** 0.5
            assert abs(pairs.count((a, b)) / num_seeds - chance) <= bound


def test_nothing_is_drafted_where_the_request_allows_none_of_the_drafts_tokens():
    """And the others in the batch are drafted for as ever."""
    small = TableModel(random_table(4, 0))
    shared = SharedTokens(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), 6, lambda token, _: [min(token, 3)])
    for params in ({}, {"temperature": 0.9}, {"temperature": 0.9, "verifier": "coupled"}):
        free, barred = sequence([1, 2], **params), sequence([1, 2], allowed_token_ids={3, 4, 5}, **params)
        partly = sequence([1, 2], allowed_token_ids={2, 5}, **params)
        drafts = ModelDrafter(small, shared).propose([free, barred, partly])
        assert (len(drafts[0].tokens), drafts[1].tokens, drafts[2].tokens) == (4, [], [2, 2, 2, 2])
        assert drafts[0].tokens == ModelDrafter(small, shared).propose([free])[0].tokens


def test_a_draft_ends_where_a_bad_word_leaves_it_nothing():
    """Of the two tokens that are shared, one may not follow the other, nor itself."""
    shared = SharedTokens(torch.tensor([0, 1]), torch.tensor([0, 1]), 4, lambda token, _: [token])
    words = ((0, 0), (0, 1), (1, 1))
    for params in ({}, {"temperature": 1.0}):
        draft = guess(ModelDrafter(TableModel(random_table(4, 0)), shared), [3], 6, bad_words_ids=words, **params)
        assert draft.tokens in ([0], [1, 0])


# Models: another tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog", "she said that the other one is there", "naïve café"] * 3
MORE_TEXTS = ["def add(left, right):\n    return left + right\n", "for item in items:\n    print(item)\n"] * 3


def byte_level(texts, vocab_size, end):
    inner = RustTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A target and a draft of random weights, with tokenizers that were trained on different texts.

    Where both have a token, the draft has the target's embeddings of it, so that it can guess what the target says.
    """
    folders = [str(tmp_path_factory.mktemp(name)) for name in ("target", "draft")]
    tokenizers = [byte_level(TEXTS, 330, "<|end|>"), byte_level(TEXTS + MORE_TEXTS, 360, "<|stop|>")]
    made = []
    for folder, tokenizer in zip(folders, tokenizers, strict=True):
        tokenizer.save_pretrained(folder)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
            eos_token_id=None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(7)
            made.append(AutoModelForCausalLM.from_config(config))
    target, draft = made
    ours, theirs = (Vocabulary(Tokenizer(folder), 400) for folder in folders)
    with torch.no_grad():
        for mine, other in zip(target.model.layers.parameters(), draft.model.layers.parameters(), strict=True):
            other.copy_(mine)
        for piece in ours.ids.keys() & theirs.ids.keys():
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                draft.get_parameter(name)[theirs.ids[piece]] = target.get_parameter(name)[ours.ids[piece]]
    for model, folder in zip(made, folders, strict=True):
        model.save_pretrained(folder)
    return tuple(HuggingFaceBackend(folder) for folder in folders)


@pytest.fixture(scope="module")
def translation(pair):
    target, draft = pair
    drafter = as_drafter(draft, target)
    assert isinstance(drafter._translation, SharedTokens)
    return drafter._translation


@pytest.fixture(scope="module")
def prompts(pair):
    tokenizer = Tokenizer(pair[0].name)
    return [
        torch.tensor([tokenizer.encode(text)]) for text in ("the quick brown fox", "she said: café 日本", "def the(other):")
    ]


@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_draft_with_another_tokenizer_leaves_greedy_output_as_it_is(k, pair, prompts):
    target, draft = pair
    num_accepted = 0
    for prompt in prompts:
        plain, _ = speculative_decode(target, None, prompt, 30)
        output, metrics = speculative_decode(target, draft, prompt, 30, K=k)
        assert torch.equal(output, plain)
        assert metrics.num_drafted > 0
        num_accepted += metrics.num_accepted
    assert num_accepted > 10


def test_only_shared_tokens_are_drafted(pair, prompts, translation):
    target, draft = pair
    shared = set(translation.target_ids.tolist())
    assert 256 < len(shared) < target.vocab_size
    for number in range(20):
        for params in ({}, {"temperature": 1.5}, {"temperature": 1.5, "verifier": "coupled"}):
            tokens = [*prompts[number % 3][0].tolist(), number]
            guessed = guess(as_drafter(draft, target), tokens, 6, **params | {"seed": number})
            assert set(guessed.tokens) <= shared
            assert set(guessed.support[guessed.q > 0].tolist()) <= shared


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8}, {"temperature": 0.8, "verifier": "block"}])
def test_the_same_model_under_other_ids_is_always_right(params, pair, prompts):
    """As long as only shared tokens are said, the two are one model."""
    target, draft = pair
    ours, theirs = (Vocabulary(Tokenizer(model.name), model.vocab_size) for model in pair)
    allowed = {ours.ids[piece] for piece in ours.ids.keys() & theirs.ids.keys()}
    prompt = [token for token in prompts[0][0].tolist() if token in allowed]
    for seed in range(4):
        _, metrics = speculative_decode(
            target,
            as_drafter(draft, target, support=1000),
            torch.tensor([prompt]),
            30,
            K=5,
            allowed_token_ids=allowed,
            seed=seed,
            **params,
        )
        assert metrics.num_drafted > 20
        assert metrics.acceptance_rate == 1


@pytest.mark.parametrize("verifier", ["rejection", "block", "coupled"])
def test_batches_of_any_prompts_are_drafted_for_as_alone(verifier, pair, prompts):
    target, draft = pair
    params = {"temperature": 0.9, "verifier": verifier}
    drafter = as_drafter(draft, target)
    together = drafter.propose([sequence(p[0].tolist(), 1 + n, seed=n, **params) for n, p in enumerate(prompts)])
    for n, prompt in enumerate(prompts):
        assert together[n].tokens == guess(drafter, prompt[0].tolist(), 1 + n, seed=n, **params).tokens
