"""What a request asks for beside tokens: several answers, ends at strings, log-probabilities, constraints."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdecode.backends.backend import Row
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.table import TableModel, random_table
from specdecode.decoding.drafters import ChainDrafter, ModelDrafter, PromptLookupDrafter
from specdecode.decoding.engine import Engine, EngineConfig
from specdecode.decoding.loop import generate, speculative_decode
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.errors import RequestError
from specdecode.text import Tokenizer
from tests.decoding.recording import counting_model

PROMPT = torch.tensor([[5, 40, 3, 17, 28]])


def generated(target, draft, prompt=PROMPT, max_new_tokens=30, K=4, **arguments):  # noqa: N803  as the function has it
    output, metrics = speculative_decode(target, draft, prompt, max_new_tokens, K, **arguments)
    return output[0, prompt.shape[1] :].tolist(), metrics


# Several answers


@pytest.mark.parametrize("verifier", ["rejection", "block", "coupled"])
@pytest.mark.parametrize("k", [0, 3])
def test_each_answer_is_what_its_seed_gives_alone(verifier, k, target, draft):
    arguments = {"temperature": 0.9, "verifier": verifier, "K": k}
    output, metrics = speculative_decode(target, draft, PROMPT, 12, n=5, seed=7, **arguments)
    assert output.shape == (5, 17)
    assert output.dtype == PROMPT.dtype
    for number, row in enumerate(output):
        assert torch.equal(row, speculative_decode(target, draft, PROMPT, 12, seed=7 + number, **arguments)[0][0])
    assert len({tuple(row) for row in output.tolist()}) == 5
    assert metrics.num_generated == 60


def test_the_seed_after_the_largest_is_zero(target, draft):
    output, _ = speculative_decode(target, draft, PROMPT, 8, n=2, temperature=1.0, seed=2**64 - 1)
    assert torch.equal(output[1], speculative_decode(target, draft, PROMPT, 8, temperature=1.0, seed=0)[0][0])


def test_answers_without_a_seed_differ(target, draft):
    output, _ = speculative_decode(target, draft, PROMPT, 20, n=4, temperature=1.0)
    assert len({tuple(row) for row in output.tolist()}) == 4


def test_greedy_answers_are_all_the_same(target, draft):
    output, _ = speculative_decode(target, draft, PROMPT, 10, n=3)
    assert output.tolist() == speculative_decode(target, None, PROMPT, 10)[0].tolist() * 3


@pytest.mark.parametrize(("eos_token_ids", "filler"), [([6, 7], 6), ([], 0)])
def test_a_short_answer_is_filled_up_with_the_end_token(eos_token_ids, filler):
    target = TableModel(random_table(8, 0), eos_token_ids=eos_token_ids)
    arguments = {"temperature": 1.0, "stop_token_ids": [3], "K": 2}
    output, metrics = speculative_decode(target, target, torch.tensor([[1, 2]]), 40, n=6, seed=0, **arguments)
    ends, num_generated = {3, *eos_token_ids}, 0
    for number, row in enumerate(output.tolist()):
        alone, _ = speculative_decode(target, target, torch.tensor([[1, 2]]), 40, seed=number, **arguments)
        answer = alone[0].tolist()
        assert answer[-1] in ends
        assert row == answer + [filler] * (output.shape[1] - len(answer))
        num_generated += len(answer) - 2
    assert metrics.num_generated == num_generated
    assert len(set(map(tuple, output.tolist()))) > 1


def test_each_answer_has_log_probabilities_of_its_own(target, draft):
    output, metrics = speculative_decode(target, draft, PROMPT, 10, n=3, temperature=1.0, seed=1, logprobs=2, prompt_logprobs=1)
    for row, logprobs in zip(output.tolist(), metrics.logprobs, strict=True):
        assert [entry.token for entry in logprobs] == row[PROMPT.shape[1] :]
    assert [entry.token for entry in metrics.prompt_logprobs] == PROMPT[0, 1:].tolist()


# Ends at strings

TEXT = "he owns a quick dog and a lazy cow, so no fox goes"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer(tokenizer_folder)


def reciting_model(tokens, vocab_size=400):
    """A model that is certain of a text, token by token, from wherever its beginning stands."""

    def distribution(context):
        one_hot = torch.zeros(vocab_size, dtype=torch.float64)
        one_hot[tokens[min(len(context) - 1, len(tokens) - 1)] if context else 0] = 1
        return one_hot

    return TableModel(distribution)


def recited(tokenizer, tokens, **arguments):
    """What is generated of a text after one token of prompt, and the metrics."""
    model = reciting_model(tokens)
    return generated(model, model, torch.tensor([[0]]), len(tokens), tokenizer=tokenizer, **arguments)


def first_end(tokenizer, tokens, stop, min_tokens=0):
    """How many tokens it takes until the text has the string, in what comes after the first `min_tokens`."""
    before = len(tokenizer.decode(tokens[:min_tokens]))
    return next((n for n in range(len(tokens) + 1) if stop in tokenizer.decode(tokens[:n])[before:]), len(tokens))


@pytest.mark.parametrize("k", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("stop", ["quick", "k d", "ow", "w, s", "dog", "e", "zy cow,", "goes", "zebra"])
def test_an_answer_ends_with_the_token_that_completes_the_string(stop, k, tokenizer):
    """Wherever tokens, drafts and rounds have their borders."""
    tokens = tokenizer.encode_part(TEXT)
    expected = tokens[: first_end(tokenizer, tokens, stop)]
    output, metrics = recited(tokenizer, tokens, K=k, stop=stop)
    assert output == expected
    assert metrics.num_generated == len(expected)
    assert metrics.num_accepted <= metrics.num_drafted


def test_the_strings_are_found_across_tokens_and_in_the_middle_of_a_draft(tokenizer):
    """Which the strings of the test before are meant to be."""
    tokens = tokenizer.encode_part(TEXT)
    texts = [tokenizer.decode([token]) for token in tokens]
    assert len(tokens) > 12
    assert not any("k d" in text or "w, s" in text for text in texts)
    _, metrics = recited(tokenizer, tokens, K=12, stop="k d")
    assert metrics.num_target_passes == 1
    assert metrics.num_accepted == metrics.num_generated < metrics.num_drafted


@pytest.mark.parametrize("k", [0, 3, 8])
def test_the_first_of_several_strings_counts(k, tokenizer):
    tokens = tokenizer.encode_part(TEXT)
    output, _ = recited(tokenizer, tokens, K=k, stop=["fox", "dog", "nothing"])
    assert output == tokens[: first_end(tokenizer, tokens, "dog")]


@pytest.mark.parametrize("k", [0, 2, 5])
@pytest.mark.parametrize("min_tokens", range(0, 16, 3))
def test_no_string_ends_an_answer_before_the_least_number_of_tokens(min_tokens, k, tokenizer):
    tokens = tokenizer.encode_part(TEXT)
    output, _ = recited(tokenizer, tokens, K=k, stop="o", min_tokens=min_tokens)
    assert output == tokens[: first_end(tokenizer, tokens, "o", min_tokens)]
    assert len(output) > min_tokens


def test_a_character_of_several_tokens_ends_an_answer_when_it_is_whole(tokenizer):
    tokens = tokenizer.encode_part("naïve 火山 text")
    for k in (0, 2, 5):
        output, _ = recited(tokenizer, tokens, K=k, stop="火")
        assert tokenizer.decode(output) == "naïve 火"


def test_log_probabilities_end_with_the_answer(tokenizer):
    tokens = tokenizer.encode_part(TEXT)
    output, metrics = recited(tokenizer, tokens, K=6, stop="lazy", logprobs=1)
    assert [entry.token for entry in metrics.logprobs[0]] == output


def test_each_answer_ends_at_its_own_place(tokenizer):
    target = TableModel(random_table(300, 0, order=1, sharpness=2.0))
    output, _ = speculative_decode(
        target, target, torch.tensor([[70]]), 60, K=3, n=4, temperature=1.0, seed=3, stop=["e", "q"], tokenizer=tokenizer
    )
    lengths = set()
    for number, row in enumerate(output.tolist()):
        whole, _ = generated(target, target, torch.tensor([[70]]), 60, K=3, temperature=1.0, seed=3 + number)
        length = min(first_end(tokenizer, whole, stop) for stop in ("e", "q"))
        assert row == [70, *whole[:length]] + [0] * (output.shape[1] - 1 - length)
        lengths.add(length)
    assert len(lengths) > 1


def test_strings_need_a_tokenizer():
    with pytest.raises(RequestError, match=r"stop: .*tokenizer"):
        speculative_decode(counting_model(), None, torch.tensor([[0]]), stop=["x"])


# Log-probabilities


def check_logprobs(entries, tokens, context, target, num_top):
    """Compares with the model's raw logits, one position at a time."""
    assert [entry.token for entry in entries] == tokens
    for entry in entries:
        logits = target.logits([Row("reference", context, 1)])[0]
        log_p = logits.float().log_softmax(-1)
        assert entry.logprob == pytest.approx(log_p[entry.token].item(), abs=1e-4)
        num_clearly_above = int((log_p > log_p[entry.token] + 1e-4).sum())
        num_near = int((log_p >= log_p[entry.token] - 1e-4).sum())
        assert num_clearly_above < entry.rank <= num_near
        expected = log_p.topk(min(num_top, len(log_p)))
        assert len(entry.top) == len(expected.values)
        assert [value for _, value in entry.top] == pytest.approx(expected.values.tolist(), abs=1e-4)
        assert all(log_p[token].item() == pytest.approx(value, abs=1e-4) for token, value in entry.top)
        context = [*context, entry.token]


ASKED = [
    {},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.5, "top_p": 0.7, "verifier": "block", "seed": 2},
    {"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 1.0, "verifier": "coupled", "seed": 3},
    {"logit_bias": {3: 50.0}, "bad_words_ids": ((3, 3),), "presence_penalty": 1.0},
]


@pytest.mark.parametrize("name", ["none", "model", "lookup and model"])
@pytest.mark.parametrize("params", ASKED, ids=lambda params: ",".join(params) or "greedy")
def test_log_probabilities_are_the_models_own(params, name, target, draft):
    """Before any sampling parameter, whoever drafted."""
    drafter = {"none": None, "model": draft, "lookup and model": ChainDrafter([PromptLookupDrafter(), ModelDrafter(draft)])}
    for k, num_top in [(0, 0), (1, 3), (4, 1), (6, 100)]:
        output, metrics = generated(
            target, drafter[name], max_new_tokens=14, K=k, logprobs=num_top, prompt_logprobs=num_top, **params
        )
        (entries,) = metrics.logprobs
        prompt = PROMPT[0].tolist()
        check_logprobs(entries, output, prompt, target, num_top)
        check_logprobs(metrics.prompt_logprobs, prompt[1:], prompt[:1], target, num_top)
        assert output == generated(target, drafter[name], max_new_tokens=14, K=k, **params)[0]


def test_a_certain_token_has_the_first_rank_and_a_log_probability_of_zero():
    output, metrics = generated(counting_model(), None, torch.tensor([[0, 1, 5]]), 3, logprobs=1, prompt_logprobs=1)
    assert output == [6, 7, 8]
    assert [(entry.logprob, entry.rank, entry.top) for entry in metrics.logprobs[0]] == [
        (0.0, 1, ((token, 0.0),)) for token in output
    ]
    assert [(entry.token, entry.rank) for entry in metrics.prompt_logprobs] == [(1, 1), (5, 10)]


def test_no_log_probabilities_are_reported_unasked(target, draft):
    _, metrics = generated(target, draft)
    assert metrics.logprobs == metrics.prompt_logprobs == []


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 300])
def test_every_token_of_a_prompt_but_the_first_has_one(length, target):
    rng = random.Random(length)
    prompt = [rng.randrange(61) for _ in range(length)]
    _, metrics = generated(target, None, torch.tensor([prompt]), 2, prompt_logprobs=0)
    assert [entry.token for entry in metrics.prompt_logprobs] == prompt[1:]
    logits = target.model.forward(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].float().log_softmax(-1)
    expected = [logits[place, token].item() for place, token in enumerate(prompt[1:])]
    assert [entry.logprob for entry in metrics.prompt_logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_an_engine_reports_the_prompts_in_the_first_round(chunk, target, draft):
    """Also of prompts that a cache remembers from before, and for the one that asks alone."""
    prompt = [5, 40, 3, 17, 28, 9, 33]
    engine = Engine(target, ModelDrafter(draft), EngineConfig(max_batch=2, prefill_chunk=chunk))
    asking = [Sequence(prompt, SamplingParams(max_tokens=5, prompt_logprobs=2), Route("draft", 2)) for _ in range(3)]
    silent = Sequence(prompt, SamplingParams(max_tokens=5), Route("draft", 2))
    for sequence in [*asking[:2], silent, asking[2]]:
        engine.submit(sequence)
    rounds = {sequence.id: [] for sequence in [*asking, silent]}
    for sequence, round in engine.run():
        rounds[sequence.id].append(round)
    for sequence in asking:
        first, *others = rounds[sequence.id]
        check_logprobs(first.prompt_logprobs, prompt[1:], prompt[:1], target, 2)
        assert all(round.prompt_logprobs is None for round in others)
    assert all(round.prompt_logprobs is None for round in rounds[silent.id])


# Constraints, against transformers


CONSTRAINTS = {
    "repetition penalty": ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    "repetition reward": ({"repetition_penalty": 0.7}, {"repetition_penalty": 0.7}),
    "bad words": (
        {"bad_words_ids": ((17,), (3, 17), (40, 5, 3), (28, 28))},
        {"bad_words_ids": [[17], [3, 17], [40, 5, 3], [28, 28]]},
    ),
    "logit bias": (
        {"logit_bias": {7: 4.0, 28: -6.0}},
        {"sequence_bias": [[[7], 4.0], [[28], -6.0]]},
    ),
    "bias and penalty": (
        {"logit_bias": {7: 4.0, 28: -6.0}, "repetition_penalty": 1.6},
        {"sequence_bias": [[[7], 4.0], [[28], -6.0]], "repetition_penalty": 1.6},
    ),
}


def greedy_prompts(count=6):
    rng = random.Random(0)
    return [torch.tensor([[rng.randrange(61) for _ in range(rng.randint(2, 20))]]) for _ in range(count)]


def transformers_tokens(target, prompt, **arguments):
    output = target.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=30, pad_token_id=0, **arguments
    )
    return output[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constrained_greedy_decoding_equals_transformers(name, target, draft):
    """Which penalises the tokens of prompt and output alike, too."""
    ours, theirs = CONSTRAINTS[name]
    num_changed = 0
    for number, prompt in enumerate(greedy_prompts()):
        expected = transformers_tokens(target, prompt, **theirs)
        num_changed += expected != transformers_tokens(target, prompt)
        for k in (0, 1 + number):
            assert generated(target, draft, prompt, K=k, **ours)[0] == expected
    assert num_changed > 3


@pytest.fixture(scope="module")
def ending(target_folder, tmp_path_factory):
    """The target, of which some token that it likes to say ends a text."""
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32)
    first = transformers_tokens(HuggingFaceBackend(target_folder), greedy_prompts(1)[0])
    model.config.eos_token_id = model.generation_config.eos_token_id = first[4]
    folder = str(tmp_path_factory.mktemp("ending"))
    model.save_pretrained(folder)
    return HuggingFaceBackend(folder)


@pytest.mark.parametrize("min_tokens", [0, 3, 10, 30])
def test_the_least_number_of_tokens_equals_transformers(min_tokens, ending, draft):
    assert ending.eos_token_ids
    lengths = set()
    for number, prompt in enumerate(greedy_prompts()):
        expected = transformers_tokens(ending, prompt, **({"min_new_tokens": min_tokens} if min_tokens else {}))
        for k in (0, 1 + number):
            assert generated(ending, draft, prompt, K=k, min_tokens=min_tokens)[0] == expected
        lengths.add(len(expected))
    assert min(lengths) >= min_tokens


# Constraints, at the borders of rounds


def constant_model(p, **options):
    """A model to which all contexts are the same."""
    return TableModel(lambda _: torch.tensor(p, dtype=torch.float64), **options)


@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 4}, {"temperature": 1.0, "verifier": "block", "seed": 5}])
def test_a_bad_word_is_never_said_whatever_rounds_it_would_span(params, k, target, draft):
    """The words are those that would be said without the ban."""
    said, _ = generated(target, draft, max_new_tokens=40, K=k, **params)
    words = [tuple(said[place : place + length]) for place, length in [(0, 2), (3, 3), (9, 2), (14, 4), (20, 2)]]
    output, _ = generated(target, draft, max_new_tokens=40, K=k, bad_words_ids=words, **params)
    text = PROMPT[0].tolist() + output
    for word in words:
        assert not any(tuple(text[place : place + len(word)]) == word for place in range(5, len(text)))
    assert output != said


@pytest.mark.parametrize("k", range(5))
def test_a_bad_word_that_begins_in_the_prompt_is_not_completed(k):
    model = counting_model()
    target = TableModel(lambda tokens: 0.9 * model._distribution(tokens) + 0.01)
    output, _ = generated(target, target, torch.tensor([[1, 2]]), 20, K=k, bad_words_ids=((1, 2, 3),))
    assert output[0] != 3
    text = [1, 2, *output]
    assert (1, 2, 3) not in list(zip(text, text[1:], text[2:], strict=False))


@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize("num_free", [0, 1, 4, 9])
def test_no_end_token_comes_before_the_least_number_of_tokens(num_free, k):
    """The model would end at once; drafts that do not know of it must not end it either."""

    target, unaware = constant_model([0.9, 0.06, 0.04], eos_token_ids=[0]), Eager(0)
    for drafter in (target, unaware):
        output, _ = generated(target, drafter, torch.tensor([[1]]), 20, K=k, min_tokens=num_free)
        assert output == [1] * num_free + [0]


class Eager:
    """Drafts one token, over and over."""

    def __init__(self, token):
        self._token = token

    def propose(self, sequences):
        return [Draft.certain([self._token] * max(0, s.num_wanted)) if s.num_wanted > 0 else Draft.empty() for s in sequences]


@pytest.mark.parametrize("params", [{}, {"temperature": 2.0}, {"temperature": 2.0, "verifier": "coupled", "top_p": 0.9}])
@pytest.mark.parametrize("k", [0, 1, 5])
def test_only_allowed_tokens_are_said(params, k, target, draft):
    allowed = {2, 3, 30, 31, 60}
    for drafter in (draft, Eager(7), Eager(30)):
        output, _ = generated(target, drafter, max_new_tokens=40, K=k, allowed_token_ids=allowed, seed=1, **params)
        assert set(output) <= allowed
        assert len(output) == 40


def test_a_penalty_counts_what_was_drafted_in_the_same_round():
    """A strong penalty makes all tokens be said once before any is said twice."""
    target = constant_model([1 / 12] * 12)
    for k in (0, 3, 7):
        output, _ = generated(target, target, torch.tensor([[0]]), 12, K=k, frequency_penalty=2.0)
        assert sorted(output) == list(range(12))
        sampled, _ = generated(target, target, torch.tensor([[0]]), 12, K=k, frequency_penalty=2.0, temperature=0.02, seed=k)
        assert sorted(sampled) == list(range(12))


def test_a_penalty_on_presence_does_not_see_the_prompt_and_one_on_repetition_does():
    target = constant_model([0.5, 0.3, 0.2])
    prompt = torch.tensor([[0]])
    assert generated(target, target, prompt, 3, K=2, presence_penalty=2.0)[0] == [0, 1, 2]
    # The logits are negative, and a repeated one is multiplied: 3 * log 0.5 < log 0.2.
    assert generated(target, target, prompt, 3, K=2, repetition_penalty=3.0)[0] == [1, 2, 0]


def test_constraints_are_those_of_each_sequence_in_a_batch(target, draft):
    params = [SamplingParams(max_tokens=20, **changes) for changes in ASKED]
    together = [Sequence(PROMPT[0].tolist(), p, Route("draft", 3)) for p in params]
    for _ in generate(together, ModelDrafter(draft), target):
        pass
    for sequence, changes in zip(together, ASKED, strict=True):
        assert sequence.tokens[5:] == generated(target, draft, max_new_tokens=20, K=3, **changes)[0]
