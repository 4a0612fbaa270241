"""A draft model in a replica: it listens for the targets that have a lease, and drafts for all of them together.

Asked by its own name it answers by itself, on another thread; the model takes one pass at a time, whoever wants it.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from serve.config import DraftModelConfig, ExchangeConfig
from serve.decoder import Offer, cache_fault, model_drafter, plain_engine
from serve.generation import Generation, Item, TargetInfo, answer
from serve.log import begin_log
from serve.metrics import METRICS_PERIOD_S, Metrics
from serve.models import part
from serve.worker import EngineThread
from specdecode.backends.backend import ModelConfig, open_model
from specdecode.exchange.connection import Limits
from specdecode.exchange.listener import Listener
from specdecode.exchange.messages import ModelTokens
from specdecode.exchange.scheduler import DraftScheduler, SchedulerConfig
from specdecode.routing.scoring import Budget, read_within

LOOPBACK = "127.0.0.1"
_STREAM_INTERVAL_S = 0.05


@dataclass(frozen=True)
class DraftState:
    """What a draft's replica holds: leases, sessions that were claimed, sequences of theirs, and requests under way.

    `cache_fault` says what the model's cache has found wrong with itself.
    """

    pid: int
    num_leases: int
    num_sessions: int
    num_sequences: int
    num_pending: int
    cache_fault: str | None


class DraftServer:
    """Guesses for any number of targets.

    Args:
        name: the draft's.
        config: the draft model, and how it drafts.
        exchange: how it talks to targets.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, name: str, config: DraftModelConfig, exchange: ExchangeConfig
    ) -> None:
        begin_log(config.model)
        backend = open_model(part(ModelConfig, config))
        scheduling = SchedulerConfig(max_batch=config.max_rows, run_ahead=config.run_ahead)
        scheduler = DraftScheduler(partial(model_drafter, backend, config), scheduling)
        limits = Limits(max_sessions=exchange.max_sessions, max_frame_bytes=exchange.max_frame_bytes)
        self._scheduler = scheduler
        self._backend = backend
        self._listener = Listener(scheduler, limits, exchange.tls.server_context() if exchange.tls else None)
        self._ports = exchange.port_range
        self._worker = EngineThread(plain_engine(backend), stream_interval_s=_STREAM_INTERVAL_S)
        self._replica_id = replica_id()
        self._budget = Budget(config.idle_share)
        self._node_id = ray.get_runtime_context().get_node_id()
        self._metrics = Metrics()
        self._tasks = [asyncio.create_task(self._metrics.keep_exporting()), asyncio.create_task(self._keep_counting(name))]

    async def lease(self, node_id: str) -> AsyncIterator[Offer]:
        """Offers a connection to a target on that node, and lasts as long as the connection.

        Raises:
            ExchangeError: there are too many targets.
        """
        # The node's address is listened to only if somebody on another node asks.
        host = LOOPBACK if node_id == self._node_id else ray.util.get_node_ip_address()
        async with self._listener.admit() as ticket:
            address = await asyncio.to_thread(self._listener.listen, host, self._ports)
            yield Offer(*address, ticket.key)
            await asyncio.wrap_future(ticket.ended)

    async def describe(self, model: str | None = None) -> TargetInfo:  # noqa: ARG002  as a target is asked
        """What the router must know of the draft as a model."""
        return TargetInfo(self._backend.max_length, self._backend.vocab_size)

    async def generate(self, generation: Generation) -> AsyncIterator[Item]:
        """Streams one generation of the draft by itself; see `answer`."""
        async with aclosing(answer(self._worker, generation, self._replica_id)) as items:
            async for item in items:
                yield item

    async def exchange(self, caller: str, target: ModelTokens, frame: bytes) -> bytes:
        """Answers one frame of a target that has no connection."""
        return await self._listener.call(caller, target, frame)

    async def score(self, tokens: list[int], num_prompt_tokens: int) -> tuple[int, int] | None:
        """Reads an answer, see `scoring.first_choices`; None if there is something else to do, or there was much of this."""

        def read(scheduler: DraftScheduler) -> tuple[int, int] | None:
            return None if scheduler.has_work else read_within(self._budget, self._backend, tokens, num_prompt_tokens)

        return await self._listener.inspect(read)

    async def inspect(self) -> DraftState:
        """What there is at the moment; nothing is left where no target is."""
        num_leases = self._listener.num_sessions

        def look(scheduler: DraftScheduler) -> DraftState:
            return DraftState(
                os.getpid(),
                num_leases,
                scheduler.num_sessions,
                scheduler.num_sequences,
                scheduler.num_pending,
                cache_fault(self._backend),
            )

        return await self._listener.inspect(look)

    async def check_health(self) -> None:
        """Raises if the thread that drafts is gone, upon which Serve replaces the replica."""
        if not self._listener.is_alive:
            raise RuntimeError("the thread that drafts has ended")
        self._worker.check()

    async def _keep_counting(self, name: str) -> None:
        """Reports what the scheduler has counted, for ever."""
        num_ahead = num_used = 0
        while True:
            counted = self._scheduler.metrics
            self._metrics.set("specdecode_exchange_sessions", self._listener.num_sessions, name)
            self._metrics.add("specdecode_run_ahead_tokens", counted.num_ahead - num_ahead, name)
            self._metrics.add("specdecode_run_ahead_used_tokens", counted.num_ahead_used - num_used, name)
            num_ahead, num_used = counted.num_ahead, counted.num_ahead_used
            await asyncio.sleep(METRICS_PERIOD_S)


def replica_id() -> str:
    """The name that Serve gives this replica; none outside of Serve."""
    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return ""
