"""What an object in a process of its own answers, and what is left when either process ends."""

import asyncio
import logging
import logging.handlers
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from serve.process import Process
from specdecode.errors import ModelError, RequestError

logger = logging.getLogger("ray.serve")


class Subject:
    """Says what it is told to, and keeps count of what was broken off."""

    def __init__(self, start: int = 0) -> None:
        if start < 0:
            raise ModelError(f"start: expected at least 0, got {start}")
        self._next = start
        self._num_closed = 0

    async def count(self, number: int) -> AsyncIterator[int]:
        try:
            for _ in range(number):
                yield self._next
                self._next += 1
                await asyncio.sleep(0)
        except (GeneratorExit, asyncio.CancelledError):
            self._num_closed += 1
            raise

    async def add(self, *numbers: int) -> int:
        return sum(numbers)

    async def nothing(self) -> None:
        return None

    async def wait(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self._num_closed += 1

    async def num_closed(self) -> int:
        return self._num_closed

    async def refuse(self) -> None:
        raise RequestError("top_p: expected at most 1, got 2", "top_p")

    async def fail_oddly(self) -> None:
        raise OddError(1, 2)

    async def fail_after(self, number: int) -> AsyncIterator[int]:
        for value in range(number):
            yield value
        raise ModelError("no memory")

    async def say(self, text: str) -> None:
        try:
            raise ValueError(text)
        except ValueError:
            logger.exception("it says %s", text)
        logging.getLogger("specdecode.decoding").info("of the library")

    async def block(self, seconds: float) -> None:
        time.sleep(seconds)

    async def unsendable(self) -> object:
        return lambda: None

    async def unreadable(self) -> object:
        return Unreadable()

    async def pid(self) -> int:
        return os.getpid()


class Unreadable:
    """Can be sent, and not be read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (int, ("one",))


class OddError(Exception):
    """Does not survive pickling: it is made of two values, and remembers one."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(one + other)


def run(test: Callable[[Process], Awaitable[Any]], *args: Any) -> list[str]:
    """Runs a test with a subject; returns why the process ended, if it did."""
    endings: list[str] = []

    async def whole() -> None:
        process = Process(Subject, *args, on_end=endings.append)
        try:
            await process.started()
            await test(process)
        finally:
            process.close()

    asyncio.run(asyncio.wait_for(whole(), 60))
    return endings


async def eventually(ask: Callable[[], Awaitable[int]], expected: int) -> None:
    async def wait() -> None:
        while await ask() != expected:
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), 10)


def is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_calls_and_streams_come_back_in_order_and_apart() -> None:
    async def test(process: Process) -> None:
        async def listen(number: int) -> list[int]:
            return [item async for item in process.stream("count", number)]

        assert await process.call("add", 1, 2, 3) == 6
        assert await process.call("nothing") is None
        assert await listen(0) == []
        found = await asyncio.gather(*(listen(500) for _ in range(4)), process.call("add", 4))
        assert found[-1] == 4
        for items in found[:4]:
            assert items == sorted(items)
            assert len(items) == 500
        assert await process.call("pid") == process.pid != os.getpid()

    assert run(test, 7) == []


def test_what_it_raises_is_raised_here() -> None:
    async def test(process: Process) -> None:
        with pytest.raises(RequestError, match="expected at most 1") as caught:
            await process.call("refuse")
        assert caught.value.param == "top_p"
        with pytest.raises(RuntimeError, match="OddError: 3"):
            await process.call("fail_oddly")
        with pytest.raises(AttributeError, match="no_such"):
            await process.call("no_such")
        seen = []
        with pytest.raises(ModelError, match="no memory"):
            async for item in process.stream("fail_after", 3):
                seen.append(item)  # noqa: PERF401  what came before the error counts
        assert seen == [0, 1, 2]

    assert run(test) == []


def test_an_object_that_cannot_be_made_is_one_error() -> None:
    async def never(_: Process) -> None:
        raise AssertionError

    with pytest.raises(ModelError, match="start: expected at least 0, got -1"):
        run(never, -1)


def test_who_leaves_ends_what_is_done_for_him() -> None:
    async def test(process: Process) -> None:
        async with aclosing(process.stream("count", 10**9)) as items:
            async for item in items:
                if item == 5:
                    break
        await eventually(lambda: process.call("num_closed"), 1)
        waiting = asyncio.create_task(process.call("wait"))
        await asyncio.sleep(0.1)
        waiting.cancel()
        await eventually(lambda: process.call("num_closed"), 2)
        assert process._waiting == {}

    assert run(test) == []


def test_what_it_logs_is_logged_here() -> None:
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(records)
    loggers = [logger, logging.getLogger("specdecode")]

    async def test(process: Process) -> None:
        await process.call("say", "hello")
        await eventually(lambda: asyncio.sleep(0, records.qsize()), 2)

    for one in loggers:
        one.addHandler(handler)
    try:
        run(test)
    finally:
        for one in loggers:
            one.removeHandler(handler)
    first, second = records.get(), records.get()
    assert first.getMessage().startswith("it says hello")
    assert "ValueError: hello" in first.getMessage()
    assert (second.name, second.getMessage()) == ("specdecode.decoding", "of the library")


def test_all_who_wait_hear_of_its_end() -> None:
    async def test(process: Process) -> None:
        waiting = [asyncio.create_task(process.call("wait")) for _ in range(3)]
        await asyncio.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        for task in waiting:
            with pytest.raises(ChildProcessError, match="has ended with status -9"):
                await task
        with pytest.raises(ChildProcessError, match="has ended with status -9"):
            await process.call("add", 1)

    [ending] = run(test)
    assert "has ended with status -9" in ending


@pytest.mark.parametrize(("method", "status"), [("unsendable", 1), ("unreadable", -9)])
def test_what_cannot_be_said_is_its_end_and_nobody_waits_for_ever(method: str, status: int) -> None:
    async def test(process: Process) -> None:
        waiting = asyncio.create_task(process.call("wait"))
        with pytest.raises(ChildProcessError, match=f"status {status}"):
            await process.call(method)
        with pytest.raises(ChildProcessError, match=f"status {status}"):
            await waiting

    assert len(run(test)) == 1


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("is_busy", [False, True])
def test_it_ends_with_whoever_started_it(ending: signal.Signals, is_busy: bool) -> None:
    script = f"""
import asyncio
from serve.process import Process
from tests.serve.test_process import Subject
async def main():
    process = Process(Subject, on_end=print)
    await process.started()
    print(process.pid, flush=True)
    await process.call({"'block', 600" if is_busy else "'wait'"})
asyncio.run(main())
"""
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.2)
    os.kill(child, signal.SIGINT)  # of a terminal, which is no matter
    time.sleep(0.2)
    assert is_alive(child)
    parent.send_signal(ending)
    parent.wait(10)
    parent.stdout.close()
    end = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < end
        time.sleep(0.05)
