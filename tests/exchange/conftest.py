"""A draft that listens, and looks that nothing is left behind of it."""

import asyncio
import gc
import logging
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType

import pytest
import torch

from specdecode.backends.backend import Row
from specdecode.backends.table import TableModel
from specdecode.exchange.channel import TcpChannel
from specdecode.exchange.connection import Limits
from specdecode.exchange.listener import Listener, Ticket
from specdecode.exchange.scheduler import DraftScheduler
from tests.decoding.recording import RecordingBackend
from tests.exchange.pairs import DRAFT, TOKENS, scheduler

HOST = "127.0.0.1"


class Interrupted(RecordingBackend):
    """A model before whose passes something else is done."""

    def __init__(self, backend: TableModel, before_pass: Callable[[], None]) -> None:
        super().__init__(backend)
        self._before_pass = before_pass

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        self._before_pass()
        return super().logits(rows)


class Leasing:
    """A draft that listens, and gives keys out to whoever asks.

    Attributes:
        before_pass: is called in the draft's thread before each of its passes.
    """

    def __init__(self, limits: Limits | None = None, tls: object = None, **config: object) -> None:
        self.before_pass: Callable[[], None] = lambda: None
        model = Interrupted(DRAFT, lambda: self.before_pass())
        self.scheduler: DraftScheduler = scheduler(model, **config)  # type: ignore[arg-type]
        self.listener = Listener(self.scheduler, limits, tls)  # type: ignore[arg-type]
        self.address = self.listener.listen(HOST)
        self._loop = asyncio.new_event_loop()
        self._stack = AsyncExitStack()

    def __enter__(self) -> "Leasing":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.run_until_complete(self._stack.aclose())
        self.listener.close()
        self._loop.close()

    def admit(self) -> Ticket:
        """A key, for as long as this lasts."""
        return self._loop.run_until_complete(self._stack.enter_async_context(self.listener.admit()))

    def connect(self, key: bytes | None = None, timeout_s: float = 10.0) -> TcpChannel:
        return TcpChannel.connect(self.address, key or self.admit().key, TOKENS, timeout_s)


@pytest.fixture
def leasing(nothing_is_left: None) -> Iterator[Leasing]:  # noqa: ARG001  looks when the draft is gone
    with Leasing() as one:
        yield one


@pytest.fixture
def nothing_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No thread, no socket, and nothing that asyncio has to complain of."""
    threads, files = set(threading.enumerate()), num_sockets()
    gc.freeze()  # what is there already need not be gone through
    yield
    gc.collect()
    gc.unfreeze()
    wait_until(lambda: set(threading.enumerate()) <= threads and num_sockets() <= files)
    assert [
        record.getMessage() for record in caplog.records if record.name == "asyncio" and record.levelno > logging.INFO
    ] == []


def num_sockets() -> int:
    """How many sockets this process has open."""
    descriptors = [f"/proc/self/fd/{number}" for number in range(256)]
    return sum(stat.S_ISSOCK(Path(name).stat().st_mode) for name in descriptors if Path(name).exists())


def wait_until(is_so: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for what another thread is about to do."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not become so in time"
        time.sleep(0.005)
