"""One generation as text: rounds of ids in, pieces of text out."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from serve.target import Generation
from specdecode.decoding.metrics import DecodingMetrics
from specdecode.decoding.sequence import FinishReason, Round
from specdecode.text import StopStrings, Tokenizer


@dataclass(frozen=True)
class Piece:
    """What one round added to a choice's text; `accepted_text` is its beginning, which was drafted."""

    index: int
    text: str
    accepted_text: str
    finish_reason: FinishReason | None
    round: Round


class Choice:
    """One of a request's generations.

    Args:
        index: its number within the request.
        generate: the target's streaming method.
        generation: what to generate.
        tokenizer: turns ids into text.
        stop: strings before which the text ends.
    """

    def __init__(
        self, index: int, generate: DeploymentHandle, generation: Generation, tokenizer: Tokenizer, stop: list[str]
    ) -> None:
        self.index = index
        self.generation = generation
        self.metrics = DecodingMetrics()
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._generate = generate
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopStrings(stop)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yields a piece for each round; ends the generation when a stop string appears, or the caller leaves."""
        started = time.perf_counter()
        rounds = self._generate.remote(self.generation)
        try:
            async for round in rounds:
                self.metrics.add(round, time.perf_counter() - started)
                yield self._piece(round)
                if self.finish_reason is not None:
                    return
        except RayTaskError as error:
            raise error.cause from error  # what the target raised, and not how it travelled
        finally:
            rounds.cancel()

    def _piece(self, round: Round) -> Piece:
        accepted = self._feed(self._detokenizer.decode(round.tokens[: round.num_accepted]))
        rest = self._feed(self._detokenizer.decode(round.tokens[round.num_accepted :]))
        if round.finish_reason is not None:
            rest += self._feed(self._detokenizer.flush())
            rest += self._stops.flush()
        self.text += accepted + rest
        self.finish_reason = "stop" if self._stops.is_stopped else round.finish_reason
        return Piece(self.index, accepted + rest, accepted, self.finish_reason, round)

    def _feed(self, text: str) -> str:
        return "" if self._stops.is_stopped else self._stops.feed(text)


async def merge(choices: list[Choice]) -> AsyncIterator[Piece]:
    """Yields the pieces of all choices as they come; the first error ends them all."""
    ready: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(choice, ready)) for choice in choices]
    try:
        num_open = len(pumps)
        while num_open:
            item = await ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(choice: Choice, ready: "asyncio.Queue[Any]") -> None:
    pieces = choice.pieces()
    try:
        async for piece in pieces:
            ready.put_nowait(piece)
        ready.put_nowait(None)
    except Exception as error:
        ready.put_nowait(error)
    finally:
        await pieces.aclose()
