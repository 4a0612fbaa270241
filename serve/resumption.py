"""A generation in, its rounds out, whichever target replicas it takes. Knows no text and no HTTP.

A replica that is lost in mid-answer leaves the tokens that came of it. Rounds arrive whole, so they end where a round began,
and random numbers are functions of the seed and that place: another replica goes on as the lost one would have.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

import grpc  # type: ignore[import-untyped]
from ray.exceptions import RayActorError, RayTaskError

from serve.errors import UnavailableError
from serve.generation import Admission, Generation, Item, PromptLogprobs
from specdecode.decoding.sequence import Round, TokenLogprob
from specdecode.errors import OverloadedError

logger = logging.getLogger("ray.serve")

_RETRY_PERIOD_S = 0.1
# How gRPC says that the other end went away, or took the call back while it shut down.
_GONE = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL}


class Stream(Protocol):
    """What a replica answers, item by item."""

    def __aiter__(self) -> AsyncIterator[Item]: ...

    def cancel(self) -> None:
        """Ends it on the replica too."""
        ...


class Targets(Protocol):
    """The target's replicas; a `DeploymentHandle` of `TargetServer.generate` is one."""

    def remote(self, generation: Generation) -> Stream:
        """Sends the generation to a replica."""
        ...


@dataclass(frozen=True)
class Failover:
    """How much is done for a generation whose replica is lost.

    Attributes:
        timeout_s: how long it may take until a replica has taken it on.
        max_resumptions: on how many further replicas it is taken up at the most.
    """

    timeout_s: float
    max_resumptions: int


class ReplicaLostError(Exception):
    """The replica that had a generation is gone."""


class Resumable:
    """One generation.

    Args:
        targets: whoever may do it.
        generation: what to do.
        failover: how much is done when replicas are lost.
    """

    def __init__(self, targets: Targets, generation: Generation, failover: Failover) -> None:
        self.num_resumptions = 0
        self._targets = targets
        self._generation = generation
        self._failover = failover
        self._generated: list[int] = []
        self._has_prompt_logprobs = False
        self._is_admitted = False
        self._was_admitted = False
        self._give_up_at = 0.0

    async def rounds(self) -> AsyncGenerator[Round, None]:
        """Yields all rounds; ends the generation when the caller leaves.

        Raises:
            RequestError, OverloadedError: the target refuses it.
            UnavailableError: no replica took it on in time, or too many were lost.
        """
        self._give_up_at = self._now() + self._failover.timeout_s
        while True:
            try:
                async with aclosing(self._attempt()) as rounds:
                    async for round in rounds:
                        yield round
                        if round.finish_reason is not None:
                            return
            except ReplicaLostError as error:
                self._note_loss(error)
            except OverloadedError:
                if not self._was_admitted or self._now() > self._give_up_at:
                    raise
            if not self._is_admitted:  # lost before it began, or refused though it was accepted once: not at once again
                await asyncio.sleep(_RETRY_PERIOD_S)

    async def _attempt(self) -> AsyncGenerator[Round, None]:
        """The rounds that one replica gives."""
        rest = self._generation.continued(self._generated, has_prompt_logprobs=self._has_prompt_logprobs)
        stream = self._targets.remote(rest)
        self._is_admitted = False
        prompt_logprobs: list[TokenLogprob] | None = None
        try:
            while True:
                item = await self._next(stream)
                if isinstance(item, Admission):
                    self._is_admitted = self._was_admitted = True
                elif isinstance(item, PromptLogprobs):
                    prompt_logprobs = (prompt_logprobs or []) + item.values
                else:
                    for round in item:
                        self._generated += round.tokens
                        self._has_prompt_logprobs = True
                        yield replace(round, prompt_logprobs=prompt_logprobs)
                        prompt_logprobs = None
        finally:
            stream.cancel()

    async def _next(self, stream: Stream) -> Item:
        """Awaits the next item; until the replica has taken the generation on, only for so long."""
        task = asyncio.ensure_future(_pull(stream))
        try:
            await asyncio.wait({task}, timeout=None if self._is_admitted else max(0.0, self._give_up_at - self._now()))
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            raise UnavailableError(f"no replica of the model took the request on within {self._failover.timeout_s:g} s")
        if task.cancelled():  # not by us: that does not come here
            await asyncio.sleep(
                _RETRY_PERIOD_S
            )  # when a client leaves, Serve ends its calls at times before the request itself
            raise ReplicaLostError("it ended the stream")
        error = task.exception()
        if error is None:
            return task.result()
        if isinstance(error, RayTaskError):
            raise error.cause from error  # what the target raised, and not how it travelled
        if _is_loss(error):
            raise ReplicaLostError(repr(error)) from error
        raise error

    def _note_loss(self, error: ReplicaLostError) -> None:
        """Counts a lost replica, if it had taken the generation on; the time for another one to do so begins."""
        generated = len(self._generated)
        logger.warning("generation id=%s lost its replica after tokens=%d: %s", self._generation.id, generated, error)
        if not self._is_admitted:
            return
        if self.num_resumptions == self._failover.max_resumptions:
            raise UnavailableError(f"the model was lost {self.num_resumptions + 1} times while it answered") from error
        self.num_resumptions += 1
        self._give_up_at = self._now() + self._failover.timeout_s

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


async def _pull(stream: Stream) -> Item:
    async for item in stream:
        return item
    raise ReplicaLostError("the stream ended before the answer")


def _is_loss(error: BaseException) -> bool:
    """Whether an error means that the replica is gone, and not that it refused the request or failed at it."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() in _GONE
    return isinstance(error, RayActorError)
