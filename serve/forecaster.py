"""Prompts in, forecasts out, off the event loop: all that wait are forecast together, and meanwhile the next ones gather."""

import asyncio
import time
from collections.abc import Mapping
from collections.abc import Sequence as Several
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from serve.metrics import Metrics
from specdecode.decoding.metrics import Verdicts
from specdecode.routing.forecast import Forecast
from specdecode.routing.router import AdaptiveRouter

_MAX_BATCH = 64


class Subject(NamedTuple):
    """What a router looks at: a prompt's text or its last user's message, its length in tokens, and whether it is a message."""

    text: str
    num_tokens: int
    is_chat: bool


class Forecaster:
    """Lets a router forecast on a thread of its own. To be made and used on one event loop.

    Args:
        router: what forecasts.
        metrics: hears how long it takes.
    """

    def __init__(self, router: AdaptiveRouter, metrics: Metrics) -> None:
        self._router = router
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="forecaster")
        self._waiting: list[tuple[Subject, asyncio.Future[Forecast]]] = []
        self._working: asyncio.Task[None] | None = None

    async def forecast(self, subjects: Several[Subject]) -> list[Forecast]:
        """What is expected of each draft on each prompt."""
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Forecast]] = [loop.create_future() for _ in subjects]
        self._waiting += zip(subjects, futures, strict=True)
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        found = list(await asyncio.gather(*futures))
        self._metrics.observe("specdecode_routing_seconds", time.perf_counter() - started)
        return found

    def learn(self, forecast: Forecast, verdicts: Mapping[str, Verdicts]) -> None:
        """Takes what came of a forecast, when the thread has time for it."""
        self._thread.submit(self._router.learn, forecast, dict(verdicts))

    async def _work(self) -> None:
        """Forecasts what waits until nothing does."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting[:_MAX_BATCH], self._waiting[_MAX_BATCH:]
            texts, lengths, is_chat = zip(*(subject for subject, _ in batch), strict=True)
            try:
                found = await loop.run_in_executor(self._thread, self._router.forecast, texts, lengths, is_chat)
            except Exception as error:  # of all that wait for it
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), forecast in zip(batch, found, strict=True):
                if not future.done():  # whoever asked may have left
                    future.set_result(forecast)
        self._working = None
