"""Sequences join and leave between rounds, and none of them notices the others."""

import random
from dataclasses import replace

import pytest
import torch

from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.decoding.drafters import ModelDrafter, NoDrafter, RoutedDrafter
from specdecode.decoding.engine import Engine, EngineConfig
from specdecode.decoding.loop import speculative_decode
from specdecode.decoding.sequence import Route, SamplingParams, Sequence
from specdecode.errors import OverloadedError, RequestError
from tests.decoding.recording import RecordingBackend, counting_model


def counting_sequence(num_prompt_tokens=1, **params):
    return Sequence([number % 10 for number in range(num_prompt_tokens)], SamplingParams(**params), Route("draft", 3))


def random_sequences(count, *, drafters=("draft",), seed=0):
    rng = random.Random(seed)
    return [
        Sequence(
            [rng.randrange(61) for _ in range(rng.randint(1, 60))],
            SamplingParams(temperature=rng.choice([0.0, 0.8]), seed=rng.randrange(2**64), max_tokens=rng.randint(1, 25)),
            Route(rng.choice(drafters), rng.randint(0, 5)),
        )
        for _ in range(count)
    ]


def tokens_alone(sequence, target, draft):
    """What the sequence becomes when it is decoded by itself; call it before the sequence is decoded."""
    params, prompt = sequence.params, torch.tensor([sequence.tokens])
    output, _ = speculative_decode(
        target, draft, prompt, params.max_tokens, K=sequence.route.k, temperature=params.temperature, seed=params.seed
    )
    return output[0].tolist()


def test_joining_and_leaving_changes_no_token(target, draft):
    sequences = random_sequences(14)
    expected = [tokens_alone(sequence, target, draft) for sequence in sequences]
    engine = Engine(target, ModelDrafter(draft), EngineConfig(max_batch=4, prefill_chunk=8, draft_length="fixed"))
    rng, waiting, most_running = random.Random(1), list(sequences), 0
    while waiting or engine.has_work:
        for _ in range(min(len(waiting), rng.randint(0, 2))):
            engine.submit(waiting.pop(0))
        engine.step()
        most_running = max(most_running, engine.num_running)
    assert most_running == 4
    assert [sequence.tokens for sequence in sequences] == expected


def test_each_sequence_streams_all_its_tokens_in_order(target, draft):
    sequences = random_sequences(6, seed=2)
    prompts = {sequence.id: list(sequence.tokens) for sequence in sequences}
    engine = Engine(target, ModelDrafter(draft))
    for sequence in sequences:
        engine.submit(sequence)
    last = {}
    for sequence, round in engine.run():
        prompts[sequence.id] += round.tokens
        last[sequence.id] = round
    assert prompts == {sequence.id: sequence.tokens for sequence in sequences}
    assert all(last[sequence.id].finish_reason == sequence.finish_reason == "length" for sequence in sequences)


def test_several_drafters_serve_one_batch(target, draft):
    sequences = random_sequences(12, drafters=("noisy", "perfect", "unknown", None), seed=3)
    models = {"noisy": draft, "perfect": target}
    expected = [tokens_alone(sequence, target, models.get(sequence.route.drafter)) for sequence in sequences]
    drafter = RoutedDrafter({name: ModelDrafter(model) for name, model in models.items()})
    engine = Engine(target, drafter, EngineConfig(draft_length="fixed"))
    for sequence in sequences:
        engine.submit(sequence)
    drafted = dict.fromkeys(["noisy", "perfect", "unknown", None], 0)
    for sequence, round in engine.run():
        drafted[sequence.route.drafter] += round.num_drafted
    assert [sequence.tokens for sequence in sequences] == expected
    assert drafted["noisy"] > 0 and drafted["perfect"] > 0
    assert drafted["unknown"] == drafted[None] == 0


def test_a_long_prompt_is_computed_in_chunks_while_others_go_on():
    target = RecordingBackend(counting_model())
    engine = Engine(target, NoDrafter(), EngineConfig(prefill_chunk=16))
    short, long = counting_sequence(max_tokens=30), counting_sequence(100, max_tokens=2)
    engine.submit(short)
    engine.step()
    engine.submit(long)
    steps_until_long = 0
    while len(long.tokens) == 100:
        steps_until_long += 1
        assert short in [sequence for sequence, _ in engine.step()]
    assert steps_until_long == 7  # 99 tokens by 16
    prefilled = [len(rows[0].tokens) for rows in target.calls if rows[0].num_scored == 0]
    assert prefilled == [16, 32, 48, 64, 80, 96, 99]


def test_short_prompts_share_a_chunk_and_start_in_one_step():
    engine = Engine(counting_model(), NoDrafter(), EngineConfig(prefill_chunk=16))
    sequences = [counting_sequence(length) for length in (1, 6, 8)]
    for sequence in sequences:
        engine.submit(sequence)
    assert [sequence for sequence, _ in engine.step()] == sequences


def test_sequences_start_in_the_order_in_which_they_came():
    engine = Engine(counting_model(), NoDrafter(), EngineConfig(max_batch=2))
    sequences = [counting_sequence(max_tokens=3) for _ in range(6)]
    for sequence in sequences:
        engine.submit(sequence)
    finished = [sequence for sequence, round in engine.run() if round.finish_reason]
    assert finished == sequences


@pytest.mark.parametrize("has_started", [False, True])
@pytest.mark.parametrize(("max_batch", "max_queued"), [(2, 3), (1, 0)])
def test_a_full_queue_refuses_more_until_a_place_is_free(max_batch, max_queued, has_started):
    engine = Engine(counting_model(), NoDrafter(), EngineConfig(max_batch=max_batch, max_queued=max_queued))
    taken = [counting_sequence(max_tokens=20) for _ in range(max_batch + max_queued)]
    for sequence in taken:
        engine.submit(sequence)
        if has_started:
            engine.step()
    with pytest.raises(OverloadedError, match="try again later"):
        engine.submit(counting_sequence())
    engine.cancel(taken[-1])
    engine.submit(counting_sequence(max_tokens=5))
    list(engine.run())
    assert [sequence.finish_reason for sequence in taken] == ["length"] * (len(taken) - 1) + [None]


@pytest.mark.parametrize("num_steps", [0, 1, 9], ids=["queued", "prefilling", "decoding"])
def test_a_cancelled_sequence_frees_its_place(num_steps):
    engine = Engine(counting_model(), NoDrafter(), EngineConfig(max_batch=1, prefill_chunk=16))
    cancelled, follower = counting_sequence(100, max_tokens=50), counting_sequence(max_tokens=5)
    engine.submit(cancelled)
    engine.submit(follower)
    for _ in range(num_steps):
        engine.step()
    assert len(cancelled.tokens) - 100 == max(0, num_steps - 6)
    num_tokens = len(cancelled.tokens)
    engine.cancel(cancelled)
    assert {sequence.id for sequence, _ in engine.run()} == {follower.id}
    assert follower.tokens == [0, 1, 2, 3, 4, 5]
    assert (len(cancelled.tokens), cancelled.finish_reason) == (num_tokens, None)
    assert engine.num_running == engine.num_queued == 0


def test_cancelling_what_is_finished_or_unknown_does_nothing():
    engine = Engine(counting_model(), NoDrafter())
    finished, going = counting_sequence(max_tokens=1), counting_sequence(max_tokens=4)
    engine.submit(finished)
    engine.submit(going)
    engine.step()
    engine.cancel(finished)
    engine.cancel(counting_sequence())
    list(engine.run())
    assert going.tokens == [0, 1, 2, 3, 4]


def test_cancelling_all_leaves_nothing():
    engine = Engine(counting_model(), NoDrafter(), EngineConfig(max_batch=2, prefill_chunk=4))
    for length in (1, 50, 1):
        engine.submit(counting_sequence(length))
    engine.step()
    assert (engine.num_running, engine.num_queued) == (2, 1)
    engine.cancel_all()
    assert not engine.has_work
    assert engine.step() == []


def test_a_sequence_that_does_not_fit_is_refused_at_once():
    engine = Engine(counting_model(max_length=20), NoDrafter())
    with pytest.raises(RequestError, match="max_tokens"):
        engine.submit(counting_sequence(10, max_tokens=11))
    assert not engine.has_work


def test_a_resumed_sequence_goes_on_as_it_would_have(target, draft):
    """From the tokens that were streamed, with the same seed, at a round's border."""
    params = SamplingParams(temperature=0.9, seed=4, max_tokens=30)
    whole = Sequence([1, 2, 3], params, Route("draft", 4))
    engine, elsewhere = (Engine(target, ModelDrafter(draft), EngineConfig(draft_length="fixed")) for _ in range(2))
    engine.submit(whole)
    for _ in range(3):
        engine.step()
    streamed = list(whole.tokens)
    resumed = Sequence(streamed, replace(params, max_tokens=whole.num_remaining), Route("draft", 4))
    list(engine.run())
    elsewhere.submit(resumed)
    list(elsewhere.run())
    assert 3 < len(streamed) < len(whole.tokens) == 33
    assert resumed.tokens == whole.tokens


@pytest.mark.parametrize("length", [2, 40, 300])
def test_a_known_prompt_is_not_computed_again_however_long_it_is(target_folder, length):
    target = HuggingFaceBackend(target_folder)
    engine = Engine(target, NoDrafter(), EngineConfig(prefill_chunk=16))
    prompt = [number % 61 for number in range(length)]
    found = []
    for tokens in (prompt, prompt, [*prompt, 1, 2, 3], [60, *prompt]):
        sequence = Sequence(tokens, SamplingParams(max_tokens=2), Route())
        engine.submit(sequence)
        rounds = [round for _, round in engine.run()]
        found.append([round.num_cached for round in rounds])
        assert sequence.tokens == tokens_alone(Sequence(tokens, sequence.params), HuggingFaceBackend(target_folder), None)
    assert found == [[0, 0], [length - 1, 0], [length, 0], [0, 0]]


def test_a_prompt_whose_logprobs_are_asked_for_is_computed_whole(target_folder):
    engine = Engine(HuggingFaceBackend(target_folder), NoDrafter())
    for _ in range(2):
        engine.submit(Sequence([1, 2, 3, 4], SamplingParams(max_tokens=1, prompt_logprobs=0)))
        [(_, round)] = list(engine.run())
        assert (round.num_cached, len(round.prompt_logprobs)) == (0, 3)
