"""A target model in a replica: an engine on a thread of its own, and streams of rounds out of it."""

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.config import DraftConfig, DraftModelConfig, ExchangeConfig, NgramConfig, TargetConfig
from serve.draft import cache_fault, model_drafter
from serve.lease import LeaseKeeper
from serve.log import begin_log
from serve.metrics import Metrics, TargetMetrics
from serve.ranks import Ranks
from serve.worker import EngineThread
from specdecode.backends.backend import ModelBackend, open_model
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.decoding.drafters import ChainDrafter, Drafter, PromptLookupDrafter, RoutedDrafter
from specdecode.decoding.engine import Engine
from specdecode.decoding.sequence import Round, Route, SamplingParams, Sequence, TokenLogprob
from specdecode.exchange.messages import ModelTokens
from specdecode.exchange.remote import RemoteDrafter
from specdecode.routing.scoring import Budget, read_within
from specdecode.text import Tokenizer

logger = logging.getLogger("ray.serve")


# An item of a stream must stay far below the 4 MiB that gRPC takes; this many tokens' log-probabilities are about 0.5 MiB.
_MAX_PROMPT_LOGPROBS = 1024


@dataclass(frozen=True)
class Generation:
    """What a target is asked to do.

    Attributes:
        tokens: the prompt, and what was generated of the answer already.
        params: how to sample.
        route: which draft guesses.
        id: names the generation in the log.
        num_prompt_tokens: how many of `tokens` are the prompt; 0 for all.
        seed: for the random numbers, where `params` leave it open. Not in `params`: a seed there is a promise of the same
            answer again, for which drafts keep their full length.
    """

    tokens: list[int]
    params: SamplingParams
    route: Route
    id: str = ""
    num_prompt_tokens: int = 0
    seed: int | None = None

    def sequence(self) -> Sequence:
        """The sequence to decode; its id is unique, whoever uses the generation's id again."""
        id = f"{self.id}/{secrets.token_hex(4)}"
        sequence = Sequence(self.tokens, self.params, self.route, id=id, num_prompt_tokens=self.num_prompt_tokens)
        if self.params.seed is None and self.seed is not None:
            sequence.seed = self.seed
        return sequence

    def continued(self, tokens: list[int], *, has_prompt_logprobs: bool) -> "Generation":
        """The same after some of it is done: `tokens` were generated, and the prompt's log-probabilities perhaps reported."""
        if not tokens:
            return self
        params = replace(self.params, prompt_logprobs=None) if has_prompt_logprobs else self.params
        num_prompt_tokens = self.num_prompt_tokens or len(self.tokens)
        return replace(self, tokens=self.tokens + tokens, params=params, num_prompt_tokens=num_prompt_tokens)


@dataclass(frozen=True)
class Admission:
    """The first item of a stream: the engine of this replica has taken the generation on."""

    replica_id: str


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of the next of a prompt's tokens; those of the first round come before it, in parts."""

    values: list[TokenLogprob]


Item = Admission | PromptLogprobs | list[Round]


@dataclass(frozen=True)
class TargetInfo:
    """What the router must know of the target."""

    max_length: int
    vocab_size: int


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
        drafters = {name: self._drafter(name, draft, handles) for name, draft in drafts.items()}
        metrics = Metrics()
        observe = TargetMetrics(metrics, list(self._remote.values()), config.max_rows).observe
        self._worker = EngineThread(
            Engine(self._backend, RoutedDrafter(drafters), config.engine),
            observe,
            ranks.end_if_lost if ranks else None,
            stream_interval_s=config.stream_interval_s,
        )
        self._exporting = asyncio.create_task(metrics.keep_exporting())
        self._replica_id = _replica_id()
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
            backend = open_model(draft.model_config_only())
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

    async def describe(self) -> TargetInfo:
        """What the router must know."""
        return TargetInfo(self._backend.max_length, self._backend.vocab_size)

    async def generate(self, generation: Generation) -> AsyncIterator[Item]:
        """Streams one generation: an `Admission`, then all rounds that are ready at a time; to stop listening cancels it.

        Raises:
            RequestError: the prompt does not fit.
            OverloadedError: the queue is full.
        """
        async with aclosing(self._worker.stream(generation.sequence())) as stream:
            async for rounds in stream:
                if not rounds:
                    yield Admission(self._replica_id)
                    continue
                for part in _prompt_logprobs(rounds[0]):
                    yield part
                yield [replace(rounds[0], prompt_logprobs=None), *rounds[1:]]

    async def score(self, tokens: list[int], num_prompt_tokens: int, drafts: list[str]) -> dict[str, tuple[int, int]]:
        """Has drafts read an answer that others drafted, those of them that are idle; see `scoring.first_choices`."""
        reading = [name for name in drafts if name in self._readers]
        found = await asyncio.gather(*(self._readers[name](tokens, num_prompt_tokens) for name in reading))
        return {name: scores for name, scores in zip(reading, found, strict=True) if scores}

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
        self._worker.check()


_Read = Callable[[list[int], int], Awaitable[tuple[int, int] | None]]


def _prompt_logprobs(round: Round) -> Iterator[PromptLogprobs]:
    """A round's log-probabilities of the prompt, in parts."""
    values = round.prompt_logprobs
    if values is not None:
        for start in range(0, max(1, len(values)), _MAX_PROMPT_LOGPROBS):
            yield PromptLogprobs(values[start : start + _MAX_PROMPT_LOGPROBS])


def _remembered(backend: ModelBackend) -> set[str]:
    """The sequences that have a row in the backend's cache."""
    return {row.id for row in backend.cache.rows if row.id} if isinstance(backend, HuggingFaceBackend) else set()


def _replica_id() -> str:
    """The name that Serve gives this replica; none outside of Serve."""
    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return ""
