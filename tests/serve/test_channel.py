"""A draft at the other end of a channel guesses what it would guess here, and costs only speed when it fails."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch

from serve.channel import Ask, Guess, RemoteDrafter
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

    async def propose(self, asks: list[Ask], vocab_size: int) -> list[Guess]:
        self.num_calls += 1
        await asyncio.sleep(self.delay_s)
        if self.failure:
            raise self.failure
        drafter = ModelDrafter(DRAFT, vocab_size=vocab_size)
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
    return RemoteDrafter("test", channel, TARGET.vocab_size, loop, deadline_s=0.2, retry_after_s=retry_after_s)


def sequences() -> list[Sequence]:
    return [
        Sequence([1, 2, seed % 5], SamplingParams(temperature=0.5 * seed, seed=seed, max_tokens=20), Route("test", seed))
        for seed in range(4)
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


@pytest.mark.parametrize("channel", [InProcess(delay_s=60), InProcess(failure=ConnectionResetError("gone"))])
def test_a_draft_that_fails_is_no_draft(loop: asyncio.AbstractEventLoop, channel: InProcess) -> None:
    drafter = remote(channel, loop)
    assert [draft.tokens for draft in drafter.propose(sequences())] == [[], [], [], []]
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
