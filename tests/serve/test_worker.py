"""An engine's rounds reach whoever listens: the first and the last at once, those between them gathered."""

import asyncio
import time
from contextlib import aclosing

import pytest

from serve.choice import Choice, merge
from serve.resumption import Failover
from serve.transcript import Wording
from serve.worker import EngineThread
from specdecode.backends.table import TableModel, random_table
from specdecode.decoding.drafters import NoDrafter
from specdecode.decoding.engine import Engine, EngineConfig
from specdecode.decoding.sequence import Round, Route, SamplingParams, Sequence
from specdecode.text import Tokenizer
from tests.serve.test_resumption import Fake, Target, generation, unavailable

NEVER_S = 60.0


def worker(interval_s: float) -> EngineThread:
    engine = Engine(TableModel(random_table(13, 1)), NoDrafter(), EngineConfig(max_batch=1, max_queued=0))
    return EngineThread(engine, stream_interval_s=interval_s)


def sequence(max_tokens: int) -> Sequence:
    return Sequence([1, 2, 3], SamplingParams(max_tokens=max_tokens, ignore_eos=True), Route())


async def items(worker: EngineThread, max_tokens: int) -> list[list[Round]]:
    async with aclosing(worker.stream(sequence(max_tokens))) as stream:
        return [rounds async for rounds in stream]


@pytest.mark.parametrize("max_tokens", [1, 2, 300])
def test_only_what_comes_between_the_first_round_and_the_last_is_gathered(max_tokens: int) -> None:
    async def run() -> list[list[Round]]:
        return await asyncio.wait_for(items(worker(NEVER_S), max_tokens), NEVER_S / 2)

    admission, *rest = asyncio.run(run())
    assert admission == []
    assert len(rest) <= 2
    assert sum(len(round.tokens) for rounds in rest for round in rounds) == max_tokens
    assert rest[-1][-1].finish_reason == "length"


def test_what_is_gathered_is_sent_on_in_time() -> None:
    interval_s = 0.05

    async def run() -> list[float]:
        times = []
        async with aclosing(worker(interval_s).stream(sequence(3000))) as stream:
            async for rounds in stream:
                times += [time.perf_counter()] if rounds else []
        return times

    times = asyncio.run(run())
    assert len(times) > 4
    assert len(times) <= (times[-1] - times[0]) / interval_s + 3  # the first rounds and the last wait for nothing


def test_all_streams_are_due_at_the_same_instants() -> None:
    interval_s = 0.1

    async def run() -> list[float]:
        """When rounds came, as parts of the interval, of a stream that begins late in one."""
        loop, times = asyncio.get_running_loop(), []
        await asyncio.sleep((0.7 - loop.time() / interval_s) % 1 * interval_s)
        async with aclosing(worker(interval_s).stream(sequence(3000))) as stream:
            async for rounds in stream:
                times += [loop.time() / interval_s % 1] if rounds else []
        return times

    times = asyncio.run(run())
    assert len(times) > 3
    assert all(time < 0.6 for time in times[1:-1])


def test_without_an_interval_nothing_waits() -> None:
    async def run() -> list[list[Round]]:
        return await items(worker(0.0), 50)

    _, *rest = asyncio.run(run())
    assert [len(round.tokens) for rounds in rest for round in rounds] == [1] * 50


def test_a_refusal_and_a_failure_do_not_wait() -> None:
    async def run() -> None:
        busy = worker(NEVER_S)
        running = asyncio.create_task(items(busy, 10**6))
        while busy.num_streams == 0 or not await busy.inspect(lambda engine: engine.num_running):
            await asyncio.sleep(0.01)
        with pytest.raises(Exception, match="requests are waiting"):
            await items(busy, 5)

        def fail(engine: Engine) -> None:
            engine.step = lambda: 1 / 0  # type: ignore[assignment]

        await busy.inspect(fail)
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(running, NEVER_S / 2)
        assert busy.num_streams == 0

    asyncio.run(run())


def test_pieces_that_are_there_come_together_and_before_an_error(tokenizer: Tokenizer) -> None:
    async def run() -> tuple[list[int], str]:
        target = Target()
        asked = generation(max_tokens=40, logprobs=None, prompt_logprobs=None)
        fakes = [Fake([], target), Fake([(4, unavailable())], target)]
        choices = [
            Choice(index, fake, asked, Wording(), tokenizer, Failover(0.2, max_resumptions=0))
            for index, fake in enumerate(fakes)
        ]
        seen = [0, 0]
        try:
            async for pieces in merge(choices):
                assert pieces
                for choice, piece in pieces:
                    seen[choice.index] += len(piece.round.tokens)
        except Exception as error:
            return seen, repr(error)
        finally:
            await target.settle()
        return seen, ""

    seen, error = asyncio.run(run())
    assert "lost 1 times" in error
    assert seen[1] >= 3  # an admission and three rounds came before the replica was lost
