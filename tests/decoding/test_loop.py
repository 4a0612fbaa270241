"""Speculative decoding gives what the target gives alone, in fewer passes, and stops where it should."""

import random
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from specdecode.backends.backend import Row
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.table import TableModel, random_table
from specdecode.decoding.drafters import ModelDrafter, NoDrafter
from specdecode.decoding.loop import generate, speculative_decode
from specdecode.decoding.metrics import DecodingMetrics
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.errors import ModelError, RequestError
from specdecode.vocabulary import SameVocabulary
from tests.decoding.recording import RecordingBackend, counting_model

PROMPT = torch.tensor([[5, 40, 3, 17, 28]])


def decode_all(sequences, drafter, target):
    """Decodes all together, and returns the rounds of each sequence by its id."""
    rounds = {sequence.id: [] for sequence in sequences}
    for results in generate(sequences, drafter, target):
        for sequence, round in results:
            rounds[sequence.id].append(round)
    return rounds


# Equal to the target


@pytest.mark.parametrize("k", range(9))
@pytest.mark.parametrize("drafter", ["draft", "target", "none"])
def test_greedy_equals_transformers_generate(drafter, k, target, draft):
    expected = target.model.generate(PROMPT, max_new_tokens=40, do_sample=False)
    model = {"draft": draft, "target": target, "none": None}[drafter]
    output, metrics = speculative_decode(target, model, PROMPT, max_new_tokens=40, K=k)
    assert output.tolist() == expected.tolist()
    if drafter == "target" and k:
        assert metrics.acceptance_rate == 1
    if drafter == "draft" and k:
        assert 0 < metrics.acceptance_rate < 1


def varied_sequences():
    rng = random.Random(0)
    sampling = [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.9),
        SamplingParams(temperature=1.0, min_p=0.1, verifier="block"),
        SamplingParams(temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.5, verifier="coupled"),
        SamplingParams(presence_penalty=1.0, logit_bias={4: 3.0}, bad_words_ids=((7,), (3, 4))),
        SamplingParams(temperature=0.8, allowed_token_ids=frozenset(range(40)), stop_token_ids=frozenset({5, 9})),
    ]
    return [
        Sequence(
            [rng.randrange(61) for _ in range(rng.randint(1, 30))],
            replace(sampling[index % 8], seed=rng.randrange(2**64), max_tokens=rng.randint(1, 40)),
            Route("draft", rng.randint(0, 6)),
        )
        for index in range(24)
    ]


def test_batched_equals_alone(target, draft):
    together, alone = varied_sequences(), varied_sequences()
    decode_all(together, ModelDrafter(draft), target)
    for sequence in alone:
        decode_all([sequence], ModelDrafter(draft), target)
    assert [sequence.tokens for sequence in together] == [sequence.tokens for sequence in alone]
    assert [sequence.finish_reason for sequence in together] == [sequence.finish_reason for sequence in alone]


@pytest.mark.parametrize(("greedy_k", "sampled_k"), [(4, 1), (1, 4)])
def test_greedy_and_sampled_sequences_draft_together(greedy_k, sampled_k):
    target, draft = TableModel(random_table(8, 0)), TableModel(random_table(8, 1))
    greedy = Sequence([1], SamplingParams(max_tokens=12), Route("draft", greedy_k))
    sampled = Sequence([1], SamplingParams(temperature=1.0, seed=3, max_tokens=12), Route("draft", sampled_k))
    rounds = decode_all([greedy, sampled], ModelDrafter(draft), target)
    expected, _ = speculative_decode(target, None, torch.tensor([[1]]), max_new_tokens=12)
    assert greedy.tokens == expected[0].tolist()
    assert [rounds[sequence.id][0].num_drafted for sequence in (greedy, sampled)] == [greedy_k, sampled_k]


def test_sequences_of_one_prompt_do_not_share_it(target, draft):
    prompt = [5, 40, 3]
    sequences = [Sequence(prompt, SamplingParams(max_tokens=9), Route("draft", k)) for k in (0, 3)]
    decode_all(sequences, ModelDrafter(draft), target)
    assert prompt == [5, 40, 3]
    assert sequences[0].tokens == sequences[1].tokens
    assert len(sequences[0].tokens) == 12


def test_a_seed_repeats_the_output_and_another_changes_it(target, draft):
    outputs = [speculative_decode(target, draft, PROMPT, 30, temperature=1.0, seed=seed)[0].tolist() for seed in (1, 1, 2)]
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_draft_with_more_tokens_than_the_target_drafts_none_of_them():
    target, draft = TableModel(random_table(4, 0)), TableModel(random_table(6, 1, sharpness=0.1))
    recorded = RecordingBackend(target)
    sequence = Sequence([0], SamplingParams(temperature=1.0, seed=0, max_tokens=60), Route("draft", 4))
    decode_all([sequence], ModelDrafter(draft, SameVocabulary(6, 4)), recorded)
    assert {token for rows in recorded.calls for token in rows[0].tokens} == {0, 1, 2, 3}


def test_a_draft_with_fewer_tokens_than_the_target_leaves_out_what_it_cannot_read(save_model, llama_config, target):
    draft = HuggingFaceBackend(save_model(LlamaConfig(**llama_config.to_dict() | {"vocab_size": 50}), 5))
    readable, unreadable = (Sequence([3, token], SamplingParams(max_tokens=4), Route("draft", 3)) for token in (49, 50))
    rounds = decode_all([readable, unreadable], ModelDrafter(draft), target)
    assert rounds[readable.id][0].num_drafted == 3
    assert rounds[unreadable.id][0].num_drafted == 0
    for sequence, prompt in [(readable, [3, 49]), (unreadable, [3, 50])]:
        assert sequence.tokens == speculative_decode(target, None, torch.tensor([prompt]), 4)[0][0].tolist()


# Passes, tokens and where it stops


def test_a_pass_of_the_target_yields_the_draft_and_one_more():
    target = RecordingBackend(counting_model())
    output, metrics = speculative_decode(target, target, torch.tensor([[0]]), max_new_tokens=20, K=4)
    assert output[0].tolist() == [number % 10 for number in range(21)]
    passes = [rows for rows in target.calls if rows[0].num_scored == 5]
    assert len(passes) == metrics.num_target_passes == 4
    assert metrics.tokens_per_target_pass == 5


@pytest.mark.parametrize("k", [0, 1, 4])
def test_every_pass_of_the_target_is_counted(k, target, draft):
    recorded = RecordingBackend(target)
    _, metrics = speculative_decode(recorded, draft, PROMPT, max_new_tokens=30, K=k, temperature=0.8, seed=5)
    assert len(recorded.calls) == metrics.num_target_passes
    assert sum(rows[0].num_scored for rows in recorded.calls) == metrics.num_drafted + metrics.num_target_passes


def test_a_stop_token_in_a_draft_cuts_the_round():
    model = counting_model()
    sequence = Sequence([0], SamplingParams(stop_token_ids=frozenset({3})), Route("draft", 8))
    (round,) = decode_all([sequence], ModelDrafter(model), model)[sequence.id]
    assert (round.tokens, round.num_drafted, round.num_accepted) == ([1, 2, 3], 3, 3)  # nothing is drafted past an end
    assert sequence.tokens == [0, 1, 2, 3]
    assert sequence.finish_reason == round.finish_reason == "stop"


def test_a_stop_token_ends_sampled_text_at_its_first_appearance(target, draft):
    arguments = {"max_new_tokens": 40, "K": 4, "temperature": 1.0, "seed": 9}
    whole, _ = speculative_decode(target, draft, PROMPT, **arguments)
    generated = whole[0, PROMPT.shape[1] :].tolist()
    for stop in set(generated):
        output, metrics = speculative_decode(target, draft, PROMPT, stop_token_ids=[stop], **arguments)
        expected = generated[: generated.index(stop) + 1]
        assert output[0, PROMPT.shape[1] :].tolist() == expected
        assert metrics.num_generated == len(expected)


@pytest.mark.parametrize(("ignore_eos", "expected"), [(False, [1, 2, 3, 4]), (True, [1, 2, 3, 4, 5, 6])])
def test_the_models_end_token_ends_unless_ignored(ignore_eos, expected):
    model = counting_model(eos_token_ids=[4])
    output, _ = speculative_decode(model, model, torch.tensor([[0]]), max_new_tokens=6, K=3, ignore_eos=ignore_eos)
    assert output[0, 1:].tolist() == expected


def test_a_stop_token_ends_even_where_the_end_token_is_ignored():
    model = counting_model(eos_token_ids=[4])
    output, _ = speculative_decode(model, None, torch.tensor([[0]]), stop_token_ids=[6], ignore_eos=True)
    assert output[0, 1:].tolist() == [1, 2, 3, 4, 5, 6]


def test_one_token_is_one_plain_pass(target, draft):
    output, metrics = speculative_decode(target, draft, PROMPT, max_new_tokens=1, K=5)
    assert output.shape == (1, 6)
    assert (metrics.num_target_passes, metrics.num_drafted, metrics.num_generated) == (1, 0, 1)


@pytest.mark.parametrize("max_tokens", range(1, 13))
def test_no_round_drafts_more_than_it_can_use(max_tokens, target, draft):
    sequence = Sequence([7, 3], SamplingParams(max_tokens=max_tokens), Route("draft", 5))
    left = max_tokens
    for round in decode_all([sequence], ModelDrafter(draft), target)[sequence.id]:
        assert round.num_drafted == min(5, left - 1)
        left -= len(round.tokens)
    assert left == 0
    assert sequence.finish_reason == "length"


class Overeager:
    """Drafts six tokens for a counting model, whatever is wanted."""

    def propose(self, sequences):
        return [Draft.certain([(s.tokens[-1] + offset) % 10 for offset in range(1, 7)]) for s in sequences]


@pytest.mark.parametrize("stop", [3, 6, 7])
def test_what_is_accepted_after_an_end_is_dropped(stop):
    output, metrics = speculative_decode(counting_model(), Overeager(), torch.tensor([[0]]), stop_token_ids=[stop])
    assert output[0].tolist() == list(range(stop + 1))
    assert (metrics.num_drafted, metrics.num_accepted) == (6, min(stop, 6))


def test_a_drafter_that_drafts_too_much_makes_no_text_too_long():
    output, metrics = speculative_decode(counting_model(), Overeager(), torch.tensor([[0]]), max_new_tokens=4, K=2)
    assert output[0].tolist() == [0, 1, 2, 3, 4]
    assert (metrics.num_target_passes, metrics.num_generated, metrics.num_accepted) == (1, 4, 4)


def test_the_context_can_be_filled_and_no_more():
    model = counting_model(max_length=12)
    output, _ = speculative_decode(model, model, torch.tensor([[0, 1]]), max_new_tokens=10, K=4)
    assert output.shape == (1, 12)
    with pytest.raises(RequestError, match=r"max_tokens.* 2 tokens .* 11,.*context of 12"):
        speculative_decode(model, model, torch.tensor([[0, 1]]), max_new_tokens=11, K=4)


def test_a_draft_with_a_shorter_context_stops_drafting():
    target, draft = counting_model(), RecordingBackend(counting_model(max_length=8))
    output, metrics = speculative_decode(target, draft, torch.tensor([[0]]), max_new_tokens=20, K=4)
    assert output[0].tolist() == [number % 10 for number in range(21)]
    assert 0 < metrics.num_drafts < metrics.num_target_passes
    assert max(len(row.tokens) for rows in draft.calls for row in rows) <= 8


# Caches are memos


@pytest.mark.parametrize("disturbance", ["clear target", "clear draft", "clear both", "unrelated", "truncated"])
def test_what_the_caches_remember_changes_no_token(disturbance, target, draft):
    undisturbed, disturbed = varied_sequences()[:8], varied_sequences()[:8]
    decode_all(undisturbed, ModelDrafter(draft), target)
    rng, num_rounds = random.Random(1), 0
    for results in generate(disturbed, ModelDrafter(draft), target):
        num_rounds += 1
        for backend in [target] * (disturbance != "clear draft") + [draft] * (disturbance != "clear target"):
            if disturbance.startswith("clear"):
                backend.cache.clear()
            elif disturbance == "unrelated":
                backend.logits([Row(f"other {i}", [rng.randrange(61)] * rng.randint(1, 99), 1) for i in range(3)])
            else:
                backend.logits([Row(sequence.id, sequence.tokens[:2] or [0], 0) for sequence, _ in results])
    assert num_rounds > 5
    assert [sequence.tokens for sequence in disturbed] == [sequence.tokens for sequence in undisturbed]


def test_a_cache_of_few_rows_changes_no_token(target_folder, target, draft):
    small, few, expected = HuggingFaceBackend(target_folder, max_rows=2), varied_sequences()[:8], varied_sequences()[:8]
    decode_all(expected, ModelDrafter(draft), target)
    engines = [generate([sequence], ModelDrafter(draft), small) for sequence in few]
    for _ in zip_longest(*engines):  # every sequence advances in turn, and takes another one's row
        assert len(small.cache.rows) <= 2
    assert [sequence.tokens for sequence in few] == [sequence.tokens for sequence in expected]


# Metrics


@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_metrics_add_up(k, target, draft):
    output, metrics = speculative_decode(target, draft, PROMPT, max_new_tokens=50, K=k, temperature=0.6, seed=2)
    assert metrics.num_generated == output.shape[1] - PROMPT.shape[1] == 50
    assert metrics.num_generated == metrics.num_accepted + metrics.num_target_passes
    assert sum(metrics.num_drafted_at) == metrics.num_drafted
    assert sum(metrics.num_accepted_at) == metrics.num_accepted
    assert metrics.num_drafted_at[:1] == [metrics.num_drafts][: len(metrics.num_drafted_at)]
    assert metrics.num_accepted_at == sorted(metrics.num_accepted_at, reverse=True)
    assert all(a <= d for a, d in zip(metrics.num_accepted_at, metrics.num_drafted_at, strict=False))
    assert metrics.acceptance_rate == (metrics.num_accepted / metrics.num_drafted if k else 0)
    assert 0 < metrics.time_to_first_token_s <= metrics.total_time_s
    assert metrics.draft_time_s + metrics.verify_time_s <= metrics.total_time_s


def test_metrics_of_nothing_are_zero():
    metrics = DecodingMetrics()
    assert (metrics.acceptance_rate, metrics.tokens_per_second, metrics.tokens_per_target_pass) == (0, 0, 0)
    assert metrics.mean_acceptance_length == 1


# Errors


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "prompt"),
        ({"input_ids": torch.tensor([[1.0, 2.0]])}, "input_ids"),
        ({"input_ids": torch.tensor([1, 2])}, "input_ids"),
        ({"input_ids": torch.tensor([[1], [2]])}, "input_ids"),
        ({"input_ids": torch.tensor([[True, False]])}, "input_ids"),
        ({"input_ids": torch.tensor([[1, 10]])}, "prompt"),
        ({"input_ids": torch.tensor([[-1, 1]])}, "prompt"),
        ({"input_ids": torch.zeros(1, 32, dtype=torch.long)}, "prompt"),
        ({"input_ids": torch.zeros(1, 30, dtype=torch.long)}, "max_tokens"),
        ({"max_new_tokens": 0}, "max_tokens"),
        ({"K": -1}, "K"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 10**30}, "top_k"),
        ({"temperature": 1e31}, "temperature"),
        ({"repetition_penalty": 1e7}, "repetition_penalty"),
        ({"repetition_penalty": 1e-7}, "repetition_penalty"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": {1: 101.0}}, "logit_bias"),
        ({"logit_bias": {10: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": frozenset()}, "allowed_token_ids"),
        ({"allowed_token_ids": frozenset({10})}, "allowed_token_ids"),
        ({"bad_words_ids": ((),)}, "bad_words_ids"),
        ({"bad_words_ids": ((1, -1),)}, "bad_words_ids"),
        ({"bad_words_ids": tuple((token,) for token in range(10))}, "bad_words_ids"),
        ({"bad_words_ids": ((1, 3), (2, 4)), "allowed_token_ids": frozenset({3, 4})}, "bad_words_ids"),
        ({"min_tokens": 1, "stop_token_ids": frozenset(range(10))}, "min_tokens"),
        ({"min_tokens": 1, "allowed_token_ids": frozenset({3}), "stop_token_ids": frozenset({3})}, "min_tokens"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": frozenset({10})}, "stop_token_ids"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"n": 0}, "n"),
        ({"stop": "x"}, "stop"),
        ({"verifier": "hope"}, "verifier"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value,
)
def test_an_error_names_its_parameter_in_one_line(changes, param):
    model = counting_model(max_length=32)
    with pytest.raises(RequestError) as caught:
        speculative_decode(**{"target": model, "draft": model, "input_ids": torch.tensor([[1]]), "max_new_tokens": 8} | changes)
    assert caught.value.param == param
    assert param in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_draft_with_another_vocabulary_and_no_tokenizer_is_refused(tmp_path):
    target, draft = (TableModel(random_table(size, 0), name=str(tmp_path / f"{size} tokens")) for size in (10, 9))
    for model in (target, draft):
        Path(model.name).mkdir()  # a folder that is there is not asked for on the hub, which takes most of a minute
    with pytest.raises(ModelError, match=r"tokenizer of '.*/10 tokens' cannot be loaded"):
        speculative_decode(target, draft, torch.tensor([[1]]))


def test_an_unknown_parameter_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        speculative_decode(counting_model(), None, torch.tensor([[1]]), temprature=1.0)


def test_no_drafter_decodes_as_no_draft(target):
    plain, _ = speculative_decode(target, None, PROMPT, max_new_tokens=10)
    assert torch.equal(plain, speculative_decode(target, NoDrafter(), PROMPT, max_new_tokens=10)[0])
