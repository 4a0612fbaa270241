"""A target and the drafts beside it, decoding: what a replica of the target has in a process of its own. Knows no Ray."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field

from serve.generation import Generation, Item, TargetInfo, answer
from serve.metrics import Collected, Metrics, TargetMetrics
from serve.models import DrafterModel, NgramConfig, TargetModel, TlsConfig, part
from serve.worker import EngineThread
from specdecode.backends.backend import CachingBackend, ModelBackend, ModelConfig, open_model
from specdecode.backends.ranks import join
from specdecode.decoding.drafters import ChainDrafter, Drafter, ModelDrafter, NoDrafter, PromptLookupDrafter, RoutedDrafter
from specdecode.decoding.engine import Engine, EngineConfig
from specdecode.errors import ModelError
from specdecode.exchange.channel import TcpChannel
from specdecode.exchange.messages import ExchangeError, ModelTokens
from specdecode.exchange.remote import RemoteDrafter
from specdecode.routing.scoring import Budget, read_within

logger = logging.getLogger("ray.serve")

# Of a draft that is asked by its own name; few at a time, since others wait for what it drafts.
PLAIN = EngineConfig(max_batch=4, max_queued=64, draft_length="fixed")
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Offer:
    """What a draft offers: where to connect, and the key to show there."""

    host: str
    port: int
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class DecoderState:
    """What a decoder holds.

    Attributes:
        num_running, num_queued: sequences that have a place, and that wait for one.
        num_streams: generations that somebody listens to.
        num_rows, num_rows_in_use: rows of the cache that remember something, and those of sequences that run; the others may be
            dropped at any time.
        connected: for each draft with a deployment, whether it is connected.
        cache_fault: what the cache has found wrong with itself.
    """

    num_running: int
    num_queued: int
    num_streams: int
    num_rows: int
    num_rows_in_use: int
    connected: dict[str, bool]
    cache_fault: str | None


class Decoder:
    """Decodes generations together, with every draft that there is.

    Args:
        target: the model and the engine's limits.
        drafts: every draft by name.
        replica_id: names the replica in what it answers.
        tls: insists on certificates of the drafts that are elsewhere.
        ranks_folder: where the processes of a model with several find each other; this is the first.
    """

    def __init__(
        self,
        target: TargetModel,
        drafts: dict[str, NgramConfig | DrafterModel],
        replica_id: str,
        tls: TlsConfig | None = None,
        ranks_folder: str | None = None,
    ) -> None:
        if ranks_folder is not None:
            join(0, target.tp, ranks_folder)
        self._backend = open_model(part(ModelConfig, target))
        self._tokens = ModelTokens.of(self._backend)
        self._tls = tls.client_context() if tls else None
        self._replica_id = replica_id
        self._stream_interval_s = target.stream_interval_s
        self._remote: dict[str, RemoteDrafter] = {}
        self._budgets: dict[str, Budget] = {}
        self._local: dict[str, ModelBackend] = {}
        self._plain: dict[str, EngineThread] = {}  # of local drafts that were asked to answer by themselves
        drafters = {name: self._drafter(name, draft) for name, draft in drafts.items()}
        self._metrics = Metrics()
        self._worker = EngineThread(
            Engine(self._backend, RoutedDrafter(drafters), target.engine),
            TargetMetrics(self._metrics, list(self._remote.values()), target.max_rows).observe,
            self._end_if_lost if ranks_folder is not None else None,
            stream_interval_s=target.stream_interval_s,
        )

    def _drafter(self, name: str, draft: NgramConfig | DrafterModel) -> Drafter:
        lookup = PromptLookupDrafter(draft.prompt_lookup_max, draft.prompt_lookup_min)
        if isinstance(draft, NgramConfig):
            return lookup
        model = self._model_drafter(name, draft)
        return ChainDrafter([lookup, model]) if draft.lookup_first else model

    def _model_drafter(self, name: str, draft: DrafterModel) -> Drafter:
        if draft.is_deployed:
            self._remote[name] = RemoteDrafter(name, self._tokens.vocab_size, deadline_s=draft.deadline_s)
            return self._remote[name]
        backend = self._local[name] = open_model(part(ModelConfig, draft))
        if draft.idle_share and backend.vocabulary_id == self._tokens.vocabulary_id:
            self._budgets[name] = Budget(draft.idle_share)
        return model_drafter(backend, draft, self._tokens)

    async def describe(self, model: str | None = None) -> TargetInfo:
        """What the router must know of the target, or of a local draft."""
        backend = self._backend if model is None else self._local[model]
        return TargetInfo(backend.max_length, backend.vocab_size)

    async def generate(self, generation: Generation) -> AsyncIterator[Item]:
        """Streams one generation of the target, or of a local draft by itself; see `answer`."""
        async with aclosing(answer(self._worker_of(generation.model), generation, self._replica_id)) as items:
            async for item in items:
                yield item

    def _worker_of(self, model: str | None) -> EngineThread:
        """Whoever decodes with a model: the target's engine, or one of a draft alone."""
        if model is None:
            return self._worker
        if model not in self._plain:
            backend = self._local[model]
            self._plain[model] = EngineThread(plain_engine(backend), stream_interval_s=self._stream_interval_s)
        return self._plain[model]

    async def connect(self, draft: str, offer: Offer) -> str:
        """Has a draft that is elsewhere draft over a connection; returns why that ended, and ends it when it is cancelled.

        Raises:
            ExchangeError: there is no connection to be had.
        """
        drafter, address = self._remote[draft], (offer.host, offer.port)
        channel = await asyncio.to_thread(TcpChannel.connect, address, offer.key, self._tokens, _CONNECT_TIMEOUT_S, self._tls)
        logger.info("draft %s: leased at %s:%d", draft, *address)
        try:
            error: ExchangeError = await asyncio.wrap_future(drafter.connect(channel))
            return str(error)
        finally:
            drafter.disconnect()

    async def read(self, draft: str, tokens: list[int], num_prompt_tokens: int) -> tuple[int, int] | None:
        """Has a local draft read an answer that others drafted, while nothing is decoded; see `scoring.first_choices`."""
        if draft not in self._budgets:
            return None
        budget, backend = self._budgets[draft], self._local[draft]
        return await self._worker.inspect(
            lambda engine: None if engine.has_work else read_within(budget, backend, tokens, num_prompt_tokens)
        )

    async def collect(self) -> Collected:
        """What the metrics have come to since the last time."""
        return self._metrics.drain()

    async def inspect(self) -> DecoderState:
        """What there is at the moment; only memos are left where nothing runs."""
        num_streams = self._worker.num_streams
        connected = {name: drafter.is_connected for name, drafter in self._remote.items()}

        def look(engine: Engine) -> DecoderState:
            rows = _remembered(self._backend)
            in_use = rows & {sequence.id for sequence in engine.running}
            counts = (engine.num_running, engine.num_queued, num_streams, len(rows), len(in_use))
            return DecoderState(*counts, connected, cache_fault(self._backend))

        return await self._worker.inspect(look)

    async def check(self) -> None:
        """Raises if an engine's thread is gone."""
        for worker in (self._worker, *self._plain.values()):
            worker.check()

    def _end_if_lost(self) -> None:
        """Ends this process if a pass of several processes has failed, after which there is no other."""
        assert isinstance(self._backend, CachingBackend)
        try:
            self._backend.check()
        except ModelError as error:
            sys.stderr.write(f"the model is lost: {error}\n")  # what is logged would not be sent in time
            sys.stderr.flush()
            os._exit(1)


def cache_fault(backend: ModelBackend) -> str | None:
    """What the backend's cache finds wrong with itself."""
    if isinstance(backend, CachingBackend):
        try:
            backend.check_cache()
        except AssertionError as error:
            return str(error) or "a check failed"
    return None


def model_drafter(backend: ModelBackend, config: DrafterModel, target: ModelTokens) -> ModelDrafter:
    """Makes a drafter of the open model `backend`, as its configuration says.

    Raises:
        ModelError: its vocabulary has too little in common with the target's.
    """
    return ModelDrafter.between(backend, target, support=config.support, min_confidence=config.min_confidence)


def plain_engine(backend: ModelBackend) -> Engine:
    """Makes what a draft model answers with when it is asked by its own name."""
    return Engine(backend, NoDrafter(), PLAIN)


def _remembered(backend: ModelBackend) -> set[str]:
    """The sequences that have a row in the backend's cache."""
    return {row.id for row in backend.cache.rows if row.id} if isinstance(backend, CachingBackend) else set()
