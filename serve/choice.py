"""One generation as text: a target's stream of rounds in, pieces of text out."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from serve.errors import DeadlineError
from serve.generation import Generation
from serve.resumption import Failover, Resumable, Targets
from serve.transcript import Piece, Transcript, Wording
from specdecode.decoding.metrics import DecodingMetrics
from specdecode.text import Tokenizer


class Choice:
    """One of a request's generations.

    Args:
        index: its number within the request.
        targets: the target's replicas.
        generation: what to generate.
        wording: what the text is to be.
        tokenizer: turns ids into text.
        failover: how much is done when replicas are lost.
        on_end: is shown the choice when it has ended, however it did.
    """

    def __init__(
        self,
        index: int,
        targets: Targets,
        generation: Generation,
        wording: Wording,
        tokenizer: Tokenizer,
        failover: Failover,
        on_end: "Callable[[Choice], None]" = lambda _: None,
    ) -> None:
        self.index = index
        self.generation = generation
        self.metrics = DecodingMetrics()
        self.tokens: list[int] = []  # of the answer
        self.transcript = Transcript(tokenizer, wording)
        self._resumable = Resumable(targets, generation, failover)
        self._is_echoed = wording.echo is not None
        self._on_end = on_end

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yields the prompt if it is echoed, and a piece for each round; ends the generation when its text ends."""
        try:
            async with aclosing(self._pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._on_end(self)

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        started = time.perf_counter()
        async with aclosing(self._resumable.rounds()) as rounds:
            async for round in rounds:
                if self._is_echoed and self.metrics.num_target_passes == 0:
                    yield self.transcript.echo(self.generation.tokens, round.prompt_logprobs)
                piece = self.transcript.add(round)
                self.metrics.add(piece.round, time.perf_counter() - started)
                self.tokens += piece.round.tokens
                yield piece
                if piece.finish_reason is not None:
                    return

    @property
    def num_resumptions(self) -> int:
        """How many replicas were lost on the way."""
        return self._resumable.num_resumptions


async def merge(choices: list[Choice], timeout_s: float | None = None) -> AsyncGenerator[list[tuple[Choice, Piece]], None]:
    """Yields the pieces of all choices that are there at a time; the first error ends them all, and so does the timeout.

    Raises:
        DeadlineError: they took longer than `timeout_s`.
    """
    ready: asyncio.Queue[tuple[Choice, Piece] | BaseException | None] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(choice, ready)) for choice in choices]
    timer = timeout_s and asyncio.get_running_loop().call_later(timeout_s, ready.put_nowait, DeadlineError(timeout_s))
    try:
        num_open = len(pumps)
        while num_open:
            items = [await ready.get()]
            while not ready.empty():
                items.append(ready.get_nowait())
            if pieces := [item for item in items if isinstance(item, tuple)]:
                yield pieces
            for item in items:
                if isinstance(item, BaseException):
                    raise item
            num_open -= items.count(None)
    finally:
        if timer:
            timer.cancel()
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(choice: Choice, ready: "asyncio.Queue[Any]") -> None:
    pieces = choice.pieces()
    try:
        async for piece in pieces:
            ready.put_nowait((choice, piece))
        ready.put_nowait(None)
    except Exception as error:
        ready.put_nowait(error)
    finally:
        await pieces.aclose()
