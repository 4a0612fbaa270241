"""An engine on a thread of its own, and its rounds on an event loop."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Several
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from specdecode.backends.backend import ModelBackend
from specdecode.decoding.engine import Engine
from specdecode.decoding.sequence import Round, Sequence

logger = logging.getLogger("ray.serve")

T = TypeVar("T")
Observer = Callable[[Engine, list[tuple[Sequence, Round]]], None]


class EngineThread:
    """Runs an engine on a thread, and gives each sequence's rounds to whoever awaits them on the event loop.

    Args:
        engine: what to run.
        observe: is shown each round, on the thread.
        on_failure: is called when a round has failed, before those hear of it whose round it was.
        stream_interval_s: how long rounds are gathered, those of all streams until the same instant; a stream's first and its
            last are not.
    """

    def __init__(
        self,
        engine: Engine,
        observe: Observer = lambda engine, rounds: None,  # noqa: ARG005
        on_failure: Callable[[], None] | None = None,
        *,
        stream_interval_s: float = 0.0,
    ) -> None:
        self._engine = engine
        self._observe = observe
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[Sequence, _Outlet] = {}
        self._stream_interval_s = stream_interval_s
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, sequence: Sequence) -> AsyncGenerator[list[Round], None]:
        """Submits the sequence; yields none once it is taken on, then its rounds as they come; to leave cancels it."""
        outlet = self._streams[sequence] = _Outlet(self._stream_interval_s)
        self._orders.put(partial(self._submit, sequence))
        try:
            while True:
                rounds = await outlet.take()
                yield rounds
                if rounds and rounds[-1].finish_reason is not None:
                    return
        finally:
            del self._streams[sequence]
            self._orders.put(partial(self._cancel, sequence))

    @property
    def target(self) -> ModelBackend:
        """The engine's model."""
        return self._engine.target

    @property
    def num_streams(self) -> int:
        """How many sequences somebody listens to."""
        return len(self._streams)

    async def inspect(self, look: Callable[[Engine], T]) -> T:
        """Lets `look` see the engine between two rounds."""
        seen: Future[T] = Future()

        def show() -> None:
            if not seen.set_running_or_notify_cancel():  # whoever asked has left
                return
            try:
                seen.set_result(look(self._engine))
            except Exception as error:  # is told to whoever asked
                seen.set_exception(error)

        self._orders.put(show)
        return await asyncio.wrap_future(seen)

    def check(self) -> None:
        """Raises unless the thread is alive."""
        if not self._thread.is_alive():
            raise RuntimeError("the engine's thread has ended")

    def _run(self) -> None:
        while True:
            self._take_orders()
            try:
                rounds = self._engine.step()
            except Exception as error:  # what broke one batch must not end the replica
                logger.exception("a round failed; its requests fail with it")
                if self._on_failure:
                    self._on_failure()
                self._engine.cancel_all()
                self._deliver([(sequence, error) for sequence in list(self._streams)])
            else:
                self._deliver(list(rounds))
                self._observe(self._engine, rounds)

    def _take_orders(self) -> None:
        """Carries out what was asked for since the last round; waits for it when there is nothing else to do."""
        while not self._engine.has_work or not self._orders.empty():
            self._orders.get()()

    def _submit(self, sequence: Sequence) -> None:
        try:
            self._engine.submit(sequence)
        except Exception as error:
            self._deliver([(sequence, error)])
        else:
            self._deliver([(sequence, None)])

    def _cancel(self, sequence: Sequence) -> None:
        self._engine.cancel(sequence)
        ending = sequence.finish_reason or "cancelled"
        logger.info("generation id=%s ending=%s tokens=%d", sequence.id, ending, sequence.num_generated)

    def _deliver(self, items: Several[tuple[Sequence, Round | Exception | None]]) -> None:
        if items:
            self._loop.call_soon_threadsafe(self._hand_out, items)

    def _hand_out(self, items: Several[tuple[Sequence, Round | Exception | None]]) -> None:
        for sequence, item in items:
            if sequence in self._streams:
                self._streams[sequence].put(item)


class _Outlet:
    """One stream's rounds on their way to whoever listens. On the event loop only.

    What comes soon after the last rounds were taken is gathered, since an item of a stream costs more on its way through Serve
    than what is in it; the news that the sequence is taken on, its first rounds, its last and an error never wait. All streams
    are due at the same instants: the event loop takes the interpreter from the engine's thread once, and not for each of them.

    Args:
        interval_s: the time between two instants.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._items: list[Round | Exception | None] = []
        self._is_due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, item: Round | Exception | None) -> None:
        """Adds a round, an error, or the news that the sequence is taken on."""
        self._items.append(item)
        if self._timer is None or not isinstance(item, Round) or item.finish_reason is not None:
            self._is_due.set()

    async def take(self) -> list[Round]:
        """Waits for what is due; no rounds are the news that the sequence is taken on."""
        await self._is_due.wait()
        if self._items[0] is None:
            del self._items[0]
            self._set_due(bool(self._items))
            return []
        items, self._items = self._items, []
        self._set_due(False)
        if self._interval_s:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at((loop.time() // self._interval_s + 1) * self._interval_s, self._expire)
        rounds = []
        for item in items:
            if isinstance(item, Exception):
                raise item
            assert item is not None
            rounds.append(item)
        return rounds

    def _expire(self) -> None:
        self._timer = None
        self._set_due(bool(self._items))

    def _set_due(self, is_due: bool) -> None:
        self._is_due.set() if is_due else self._is_due.clear()
