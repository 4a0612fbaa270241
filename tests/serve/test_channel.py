"""A draft at the other end of a channel guesses what it would guess here, and costs only speed when it fails."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch

from serve.channel import Ask, Guess, ModelTokens, RemoteDrafter
from specdecode.backends.table import TableModel, random_table
from specdecode.decoding.drafters import ModelDrafter
from specdecode.decoding.loop import generate
from specdecode.decoding.sequence import Route, SamplingParams, Sequence

TARGET = TableModel(random_table(5, 0))
DRAFT = TableModel(random_table(5, 1))


class InProcess:
    """A channel to a drafter in this process, with whatever goes wrong on the way."""

    def __init__(self, *, delay_s: float = 0.0, failure: Exception | None = None) -> None:
        self.delay_s = delay_s
        self.failure = failure
        self.num_calls = 0

    async def propose(self, asks: list[Ask], target: ModelTokens) -> list[Guess]:
        self.num_calls += 1
        await asyncio.sleep(self.delay_s)
        if self.failure:
            raise self.failure
        assert target == ModelTokens.of(TARGET)
        drafter = ModelDrafter(DRAFT, eos_token_ids=target.eos_token_ids)
        return [Guess.of(draft) for draft in drafter.propose([ask.sequence() for ask in asks])]


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def remote(channel: InProcess, loop: asyncio.AbstractEventLoop, *, retry_after_s: float = 0.0) -> RemoteDrafter:
    target = ModelTokens.of(TARGET)
    return RemoteDrafter("test", channel, target, loop, deadline_s=0.2, retry_after_s=retry_after_s)


def sequences() -> list[Sequence]:
    penalties = {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "min_tokens": 18, "stop_token_ids": frozenset({3})}
    return [
        Sequence(
            [1, 2, seed % 5],
            SamplingParams(temperature=0.5 * (seed % 4), seed=seed, max_tokens=20, **(penalties if seed > 3 else {})),
            Route("test", seed % 4),
        )
        for seed in range(8)
    ]


def decode(drafter: object) -> list[list[int]]:
    decoded = sequences()
    for _ in generate(decoded, drafter, TARGET):  # type: ignore[arg-type]
        pass
    return [sequence.tokens for sequence in decoded]


def test_a_remote_draft_is_the_local_one(loop: asyncio.AbstractEventLoop) -> None:
    for here, there in zip(
        ModelDrafter(DRAFT).propose(sequences()), remote(InProcess(), loop).propose(sequences()), strict=True
    ):
        assert here.tokens == there.tokens
        assert torch.equal(here.support, there.support)
        assert torch.equal(here.q, there.q)


def test_decoding_with_a_remote_draft_equals_decoding_with_the_local_one(loop: asyncio.AbstractEventLoop) -> None:
    assert decode(remote(InProcess(), loop)) == decode(ModelDrafter(DRAFT))


def test_a_draft_sees_prompt_and_output_as_the_target_does() -> None:
    for sequence in sequences():
        sequence.tokens += [1, 1, 4]
        seen = Ask.of(sequence).sequence()
        assert (seen.id, seen.tokens, seen.seed, seen.params) == (sequence.id, sequence.tokens, sequence.seed, sequence.params)
        assert (seen.num_prompt_tokens, seen.num_wanted) == (3, sequence.num_wanted)


def test_a_seed_that_nobody_named_is_the_same_at_the_draft() -> None:
    sequence = Sequence([1], SamplingParams(temperature=1.0), Route("test", 3))
    assert Ask.of(sequence).sequence().seed == sequence.seed


@pytest.mark.parametrize("channel", [InProcess(delay_s=60), InProcess(failure=ConnectionResetError("gone"))])
def test_a_draft_that_fails_is_no_draft(loop: asyncio.AbstractEventLoop, channel: InProcess) -> None:
    drafter = remote(channel, loop)
    assert [draft.tokens for draft in drafter.propose(sequences())] == [[]] * 8
    assert drafter.num_failures == 1


def test_nothing_is_asked_for_a_while_after_a_failure(loop: asyncio.AbstractEventLoop) -> None:
    channel = InProcess(failure=RuntimeError("broken"))
    drafter = remote(channel, loop, retry_after_s=60)
    for _ in range(3):
        drafter.propose(sequences())
    assert channel.num_calls == 1


def test_a_draft_that_comes_back_is_asked_again(loop: asyncio.AbstractEventLoop) -> None:
    channel = InProcess(failure=RuntimeError("broken"))
    drafter = remote(channel, loop)
    drafter.propose(sequences())
    channel.failure = None
    assert any(draft.tokens for draft in drafter.propose(sequences()))
