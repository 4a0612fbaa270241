"""A target model in a replica: its decoder in a process of its own, and streams of rounds out of it."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict, dataclass
from functools import partial

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.config import DraftConfig, DraftModelConfig, ExchangeConfig, TargetConfig
from serve.decoder import Decoder, DecoderState
from serve.draft import replica_id
from serve.generation import Generation, Item, TargetInfo
from serve.lease import LeaseKeeper
from serve.log import begin_log
from serve.metrics import METRICS_PERIOD_S, Metrics
from serve.models import DrafterModel, TargetModel, part
from serve.process import Process, end_replica
from serve.ranks import Ranks
from specdecode.backends.backend import ModelConfig
from specdecode.text import Tokenizer

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class TargetState(DecoderState):
    """What a target's replica holds: what its decoder does.

    Attributes:
        pid, decoder_pid: the replica's process, and the decoder's.
    """

    pid: int
    decoder_pid: int


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
        ranks = Ranks(part(ModelConfig, config)) if config.tp > 1 else None
        self._process = Process(
            Decoder,
            part(TargetModel, config),
            {name: _without_deployment(draft) for name, draft in drafts.items()},
            replica_id(),
            exchange.tls,
            ranks.folder if ranks else None,
            on_end=end_replica,
        )
        await self._process.started()
        self._watch = asyncio.create_task(ranks.watch()) if ranks else None
        models = {name: draft for name, draft in drafts.items() if isinstance(draft, DraftModelConfig)}
        self._readers = {
            name: self._reader(name, handles.get(name))
            for name, draft in models.items()
            if draft.idle_share and Tokenizer(draft.model).vocabulary_id == Tokenizer(config.model).vocabulary_id
        }
        self._keepers = [
            asyncio.create_task(
                LeaseKeeper(name, handle, partial(self._process.call, "connect", name), models[name].retry_after_s).keep()
            )
            for name, handle in handles.items()
        ]
        self._exporting = asyncio.create_task(self._keep_exporting())

    async def describe(self, model: str | None = None) -> TargetInfo:
        """What the router must know of the target, or of a local draft."""
        info: TargetInfo = await self._process.call("describe", model)
        return info

    async def generate(self, generation: Generation) -> AsyncIterator[Item]:
        """Streams one generation of the target, or of a local draft by itself; see `generation.answer`."""
        async with aclosing(self._process.stream("generate", generation)) as items:
            async for item in items:
                yield item

    async def score(self, tokens: list[int], num_prompt_tokens: int, drafts: list[str]) -> dict[str, tuple[int, int]]:
        """Has drafts read an answer that others drafted, those of them that are idle; see `scoring.first_choices`."""
        reading = [name for name in drafts if name in self._readers]
        found = await asyncio.gather(*(self._readers[name](tokens, num_prompt_tokens) for name in reading))
        return {name: scores for name, scores in zip(reading, found, strict=True) if scores}

    def _reader(self, name: str, handle: DeploymentHandle | None) -> "_Read":
        """Who reads for a draft: its deployment, or the decoder where it is there."""
        if handle is None:
            return partial(self._process.call, "read", name)

        async def read(tokens: list[int], num_prompt_tokens: int) -> tuple[int, int] | None:
            try:
                scores: tuple[int, int] | None = await handle.score.remote(tokens, num_prompt_tokens)
            except (RayError, RayServeException):  # it is not missed
                return None
            return scores

        return read

    async def inspect(self) -> TargetState:
        """What there is at the moment; only memos are left where nothing runs."""
        state: DecoderState = await self._process.call("inspect")
        return TargetState(**asdict(state), pid=os.getpid(), decoder_pid=self._process.pid)

    async def check_health(self) -> None:
        """Raises if the decoder cannot go on, upon which Serve replaces the replica."""
        await self._process.call("check")

    async def _keep_exporting(self) -> None:
        """Hands over what the decoder has counted, for ever."""
        metrics = Metrics()
        while True:
            await asyncio.sleep(METRICS_PERIOD_S)
            metrics.export(await self._process.call("collect"))


_Read = Callable[[list[int], int], Awaitable[tuple[int, int] | None]]


def _without_deployment(draft: DraftConfig) -> DraftConfig | DrafterModel:
    return part(DrafterModel, draft) if isinstance(draft, DraftModelConfig) else draft
