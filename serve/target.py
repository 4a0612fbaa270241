"""A target model in a replica: an engine on a thread of its own, and streams of rounds out of it."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ray.serve.handle import DeploymentHandle

from serve.channel import HandleChannel, ModelTokens, RemoteDrafter
from serve.config import DraftConfig, DraftModelConfig, NgramConfig, TargetConfig
from serve.draft import model_drafter
from specdecode.backends.backend import open_model
from specdecode.decoding.drafters import ChainDrafter, Drafter, PromptLookupDrafter, RoutedDrafter
from specdecode.decoding.engine import Engine
from specdecode.decoding.sequence import Round, Route, SamplingParams, Sequence

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Generation:
    """What a target is asked to do: prompt ids, how to sample, and which draft guesses."""

    tokens: list[int]
    params: SamplingParams
    route: Route


@dataclass(frozen=True)
class TargetInfo:
    """What the router must know of the target."""

    max_length: int
    vocab_size: int


class TargetServer:
    """Decodes the requests of all routers together.

    Args:
        config: the model and the engine's limits.
        drafts: every draft by name.
        handles: the deployments of those that have one.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: TargetConfig, drafts: dict[str, DraftConfig], handles: dict[str, DeploymentHandle]
    ) -> None:
        self._backend = open_model(config.model_config_only())
        drafters = {name: self._drafter(name, draft, handles) for name, draft in drafts.items()}
        self._worker = EngineThread(Engine(self._backend, RoutedDrafter(drafters), config.engine))

    def _drafter(self, name: str, draft: DraftConfig, handles: dict[str, DeploymentHandle]) -> Drafter:
        lookup = PromptLookupDrafter(draft.prompt_lookup_max, draft.prompt_lookup_min)
        if isinstance(draft, NgramConfig):
            return lookup
        model = self._model_drafter(name, draft, handles)
        return ChainDrafter([lookup, model]) if draft.lookup_first else model

    def _model_drafter(self, name: str, draft: DraftModelConfig, handles: dict[str, DeploymentHandle]) -> Drafter:
        target = ModelTokens.of(self._backend)
        if not draft.is_deployed:
            return model_drafter(open_model(draft.model_config_only()), draft, target)
        return RemoteDrafter(
            name,
            HandleChannel(handles[name]),
            target,
            asyncio.get_running_loop(),
            deadline_s=draft.deadline_s,
            retry_after_s=draft.retry_after_s,
        )

    async def describe(self) -> TargetInfo:
        """What the router must know."""
        return TargetInfo(self._backend.max_length, self._backend.vocab_size)

    async def generate(self, generation: Generation) -> AsyncIterator[Round]:
        """Streams the rounds of one generation; whoever stops listening cancels it.

        Raises:
            RequestError: the prompt does not fit.
            OverloadedError: the queue is full.
        """
        async for round in self._worker.stream(Sequence(generation.tokens, generation.params, generation.route)):
            yield round

    async def check_health(self) -> None:
        """Raises if the engine's thread is gone, upon which Serve replaces the replica."""
        self._worker.check()


class EngineThread:
    """Runs an engine on a thread, and gives each sequence's rounds to whoever awaits them on the event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._orders: queue.SimpleQueue[tuple[str, Sequence]] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[Round | BaseException]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stream(self, sequence: Sequence) -> AsyncIterator[Round]:
        """Submits the sequence and yields its rounds; cancels it when the caller leaves."""
        rounds: asyncio.Queue[Round | BaseException] = asyncio.Queue()
        self._streams[sequence.id] = rounds
        self._orders.put(("submit", sequence))
        try:
            while True:
                item = await rounds.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            del self._streams[sequence.id]
            self._orders.put(("cancel", sequence))

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
                self._engine.cancel_all()
                self._deliver([(id, error) for id in list(self._streams)])
            else:
                self._deliver([(sequence.id, round) for sequence, round in rounds])

    def _take_orders(self) -> None:
        """Carries out what was asked for since the last round; waits for it when there is nothing else to do."""
        while not self._engine.has_work or not self._orders.empty():
            order, sequence = self._orders.get()
            if order == "cancel":
                self._engine.cancel(sequence)
                continue
            try:
                self._engine.submit(sequence)
            except Exception as error:
                self._deliver([(sequence.id, error)])

    def _deliver(self, items: list[tuple[str, Round]] | list[tuple[str, Exception]]) -> None:
        if items:
            self._loop.call_soon_threadsafe(self._hand_out, items)

    def _hand_out(self, items: list[tuple[str, Round]] | list[tuple[str, Exception]]) -> None:
        for id, item in items:
            if id in self._streams:
                self._streams[id].put_nowait(item)
