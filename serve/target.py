"""A target model in a replica: an engine on a thread of its own, and streams of rounds out of it."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.config import DraftConfig, DraftModelConfig, ExchangeConfig, NgramConfig, TargetConfig
from serve.draft import cache_fault, model_drafter, plain_engine, replica_id
from serve.generation import Generation, Item, TargetInfo, answer
from serve.lease import LeaseKeeper
from serve.log import begin_log
from serve.metrics import Metrics, TargetMetrics
from serve.ranks import Ranks
from serve.worker import EngineThread
from specdecode.backends.backend import ModelBackend, open_model
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.decoding.drafters import ChainDrafter, Drafter, PromptLookupDrafter, RoutedDrafter
from specdecode.decoding.engine import Engine
from specdecode.exchange.messages import ModelTokens
from specdecode.exchange.remote import RemoteDrafter
from specdecode.routing.scoring import Budget, read_within
from specdecode.text import Tokenizer

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class TargetState:
    """What a target's replica holds.

    Attributes:
        num_running, num_queued: sequences that have a place, and that wait for one.
        num_streams: generations that somebody listens to.
        num_rows, num_rows_in_use: rows of the cache that remember something, and those of sequences that run; the others may be
            dropped at any time.
        connected: for each draft with a deployment, whether it is leased.
        cache_fault: what the cache has found wrong with itself.
    """

    pid: int
    num_running: int
    num_queued: int
    num_streams: int
    num_rows: int
    num_rows_in_use: int
    connected: dict[str, bool]
    cache_fault: str | None


class TargetServer:
    """Decodes the requests of all routers together.

    Args:
        config: the model and the engine's limits.
        drafts: every draft by name.
        handles: the deployments of those that have one.
        exchange: how to talk to those.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: TargetConfig,
        drafts: dict[str, DraftConfig],
        handles: dict[str, DeploymentHandle],
        exchange: ExchangeConfig,
    ) -> None:
        begin_log(config.model)
        model = config.model_config_only()
        ranks = Ranks(model) if model.tp > 1 else None
        self._backend = ranks.backend if ranks else open_model(model)
        self._exchange = exchange
        self._keepers: list[asyncio.Task[None]] = []
        self._remote: dict[str, RemoteDrafter] = {}
        self._readers: dict[str, _Read] = {}
        self._local: dict[str, ModelBackend] = {}
        self._plain: dict[str, EngineThread] = {}  # of local drafts that were asked to answer by themselves
        drafters = {name: self._drafter(name, draft, handles) for name, draft in drafts.items()}
        metrics = Metrics()
        observe = TargetMetrics(metrics, list(self._remote.values()), config.max_rows).observe
        self._worker = EngineThread(
            Engine(self._backend, RoutedDrafter(drafters), config.engine),
            observe,
            ranks.end_if_lost if ranks else None,
            stream_interval_s=config.stream_interval_s,
        )
        self._stream_interval_s = config.stream_interval_s
        self._exporting = asyncio.create_task(metrics.keep_exporting())
        self._replica_id = replica_id()
        self._watch = asyncio.create_task(ranks.watch()) if ranks else None

    def _drafter(self, name: str, draft: DraftConfig, handles: dict[str, DeploymentHandle]) -> Drafter:
        lookup = PromptLookupDrafter(draft.prompt_lookup_max, draft.prompt_lookup_min)
        if isinstance(draft, NgramConfig):
            return lookup
        model = self._model_drafter(name, draft, handles)
        return ChainDrafter([lookup, model]) if draft.lookup_first else model

    def _model_drafter(self, name: str, draft: DraftModelConfig, handles: dict[str, DeploymentHandle]) -> Drafter:
        target = ModelTokens.of(self._backend)
        if not draft.is_deployed:
            backend = self._local[name] = open_model(draft.model_config_only())
            if draft.idle_share and backend.vocabulary_id == target.vocabulary_id:
                self._readers[name] = self._reader(draft, backend)
            return model_drafter(backend, draft, target)
        if draft.idle_share and Tokenizer(draft.model).vocabulary_id == target.vocabulary_id:
            self._readers[name] = self._reader(draft, handles[name])
        drafter = RemoteDrafter(name, target.vocab_size, deadline_s=draft.deadline_s)
        self._remote[name] = drafter
        keeper = LeaseKeeper(drafter, handles[name], target, draft, self._exchange)
        self._keepers.append(asyncio.create_task(keeper.keep()))
        return drafter

    async def describe(self, model: str | None = None) -> TargetInfo:
        """What the router must know of the target, or of a local draft."""
        backend = self._backend if model is None else self._local[model]
        return TargetInfo(backend.max_length, backend.vocab_size)

    async def generate(self, generation: Generation) -> AsyncIterator[Item]:
        """Streams one generation of the target, or of a local draft by itself; see `answer`."""
        async with aclosing(answer(self._worker_of(generation.model), generation, self._replica_id)) as items:
            async for item in items:
                yield item

    async def score(self, tokens: list[int], num_prompt_tokens: int, drafts: list[str]) -> dict[str, tuple[int, int]]:
        """Has drafts read an answer that others drafted, those of them that are idle; see `scoring.first_choices`."""
        reading = [name for name in drafts if name in self._readers]
        found = await asyncio.gather(*(self._readers[name](tokens, num_prompt_tokens) for name in reading))
        return {name: scores for name, scores in zip(reading, found, strict=True) if scores}

    def _worker_of(self, model: str | None) -> EngineThread:
        """Whoever decodes with a model: the target's engine, or one of a draft alone."""
        if model is None:
            return self._worker
        if model not in self._plain:
            backend = self._local[model]
            self._plain[model] = EngineThread(plain_engine(backend), stream_interval_s=self._stream_interval_s)
        return self._plain[model]

    def _reader(self, draft: DraftModelConfig, where: DeploymentHandle | ModelBackend) -> "_Read":
        """Who reads for a draft: its deployment, or the engine's thread while nothing is decoded."""
        budget = Budget(draft.idle_share)

        async def read(tokens: list[int], num_prompt_tokens: int) -> tuple[int, int] | None:
            if not isinstance(where, DeploymentHandle):
                return await self._worker.inspect(
                    lambda engine: None if engine.has_work else read_within(budget, where, tokens, num_prompt_tokens)
                )
            try:
                scores: tuple[int, int] | None = await where.score.remote(tokens, num_prompt_tokens)
            except (RayError, RayServeException):  # it is not missed
                return None
            return scores

        return read

    async def inspect(self) -> TargetState:
        """What there is at the moment; only memos are left where nothing runs."""
        num_streams = self._worker.num_streams
        connected = {name: drafter.is_connected for name, drafter in self._remote.items()}

        def look(engine: Engine) -> TargetState:
            rows = _remembered(self._backend)
            in_use = rows & {sequence.id for sequence in engine.running}
            counts = (engine.num_running, engine.num_queued, num_streams, len(rows), len(in_use))
            return TargetState(os.getpid(), *counts, connected, cache_fault(self._backend))

        return await self._worker.inspect(look)

    async def check_health(self) -> None:
        """Raises if the engine's thread is gone, upon which Serve replaces the replica."""
        for worker in (self._worker, *self._plain.values()):
            worker.check()


_Read = Callable[[list[int], int], Awaitable[tuple[int, int] | None]]


def _remembered(backend: ModelBackend) -> set[str]:
    """The sequences that have a row in the backend's cache."""
    return {row.id for row in backend.cache.rows if row.id} if isinstance(backend, HuggingFaceBackend) else set()
