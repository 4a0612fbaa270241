"""The ways to a draft, measured rung by rung: what each adds to the draft model's own work."""

from serve.cluster import connected  # isort: skip  # before all else that imports Ray

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from uuid import uuid4

import numpy as np
import ray
from pydantic import Field
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.config import DraftModelConfig, ExchangeConfig
from serve.decoder import Offer, model_drafter
from serve.draft import DraftServer
from specdecode.backends.backend import create_backend
from specdecode.config import StrictModel
from specdecode.decoding.sequence import Route, SamplingParams, Sequence
from specdecode.exchange.channel import Channel, Frame, InProcessChannel, TcpChannel
from specdecode.exchange.frames import HEADER_BYTES, decode_header
from specdecode.exchange.messages import ExchangeError, ModelTokens
from specdecode.exchange.remote import RemoteDrafter
from specdecode.exchange.scheduler import DraftScheduler

Rung = Literal["in process", "tcp", "handle"]

_APPLICATION = "ladder"


class LadderConfig(StrictModel):
    """What to measure with."""

    target: str = Field(default="tiny/target", description="the model that is drafted for; only its vocabulary matters")
    draft: str = "tiny/draft-code"
    batches: list[int] = Field(default=[1, 16], min_length=1)
    K: int = Field(default=5, gt=0)
    support: int = Field(default=64, gt=0, description="how many tokens each q covers")
    temperature: float = Field(default=1.0, ge=0)
    length: int = Field(default=64, gt=1, description="tokens of each prompt")
    num_rounds: int = Field(default=300, gt=0)
    num_warmup_rounds: int = Field(default=20, ge=0)


@dataclass(frozen=True)
class RungTimes:
    """Milliseconds from asking for drafts to having them, less the draft model's own work, and that work."""

    rung: Rung
    batch: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    draft_ms: float


def measure_ladder(config: LadderConfig) -> list[RungTimes]:
    """Asks for the same drafts over every way in turn; starts a local Ray unless this process is connected to one."""
    target = ModelTokens.of(create_backend(config.target))
    draft = DraftModelConfig(model=config.draft, support=config.support)
    with _channels(target, draft) as channels:
        drafters: dict[Rung, RemoteDrafter] = {}
        for rung, channel in channels.items():
            drafters[rung] = RemoteDrafter(rung, target.vocab_size, deadline_s=30.0)
            drafters[rung].connect(channel)
        return [times for batch in config.batches for times in _measure(config, target, drafters, batch)]


def _measure(config: LadderConfig, target: ModelTokens, drafters: dict[Rung, RemoteDrafter], batch: int) -> Iterator[RungTimes]:
    exchange_s: dict[Rung, list[float]] = {rung: [] for rung in drafters}
    busy_s: dict[Rung, list[float]] = {rung: [] for rung in drafters}
    sequences = {rung: _sequences(config, target, batch) for rung in drafters}
    for number in range(config.num_warmup_rounds + config.num_rounds):
        for rung, drafter in drafters.items():
            drafts = drafter.propose(sequences[rung])
            assert drafter.is_connected, "the draft was lost"
            if number >= config.num_warmup_rounds:
                exchange_s[rung].append(drafter.metrics.last_exchange_s)
                busy_s[rung].append(drafter.metrics.last_busy_s)
            for sequence, draft in zip(sequences[rung], drafts, strict=True):
                sequence.tokens += [*draft.tokens[: config.K // 2], number % target.vocab_size]  # some of it is accepted
        if number % 50 == 49:
            sequences = {rung: _sequences(config, target, batch) for rung in drafters}
    for rung in drafters:
        p50, p90, p99 = (1e3 * float(np.percentile(exchange_s[rung], q)) for q in (50, 90, 99))
        yield RungTimes(rung, batch, p50, p90, p99, 1e3 * float(np.median(busy_s[rung])))


def _sequences(config: LadderConfig, target: ModelTokens, batch: int) -> list[Sequence]:
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=config.temperature, max_tokens=1 << 20, ignore_eos=True)
    return [
        Sequence(rng.integers(0, target.vocab_size, config.length).tolist(), params, Route("draft", config.K))
        for _ in range(batch)
    ]


@contextmanager
def _channels(target: ModelTokens, draft: DraftModelConfig) -> Iterator[dict[Rung, Channel]]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with connected():
        try:
            serve.start(proxy_location="Disabled")
            application = serve.deployment(DraftServer).options(name="Draft").bind("ladder", draft, ExchangeConfig())
            handle = serve.run(application, name=_APPLICATION, route_prefix=None)
            lease = handle.options(method_name="lease", stream=True).remote(ray.get_runtime_context().get_node_id())
            offer: Offer = asyncio.run_coroutine_threadsafe(anext(lease), loop).result()
            backend = create_backend(draft.model)
            yield {
                "in process": InProcessChannel(DraftScheduler(lambda target: model_drafter(backend, draft, target)), target),
                "tcp": TcpChannel.connect((offer.host, offer.port), offer.key, target, 10.0),
                "handle": HandleChannel(handle.options(method_name="exchange"), target, loop),
            }
        finally:
            serve.delete(_APPLICATION)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


class HandleChannel:
    """A channel that is a Serve handle: every round is a call."""

    def __init__(self, exchange: DeploymentHandle, target: ModelTokens, loop: asyncio.AbstractEventLoop) -> None:
        self._exchange = exchange
        self._target = target
        self._loop = loop
        self._caller = uuid4().hex
        self._calls: list[Future[bytes]] = []

    def send(self, frame: bytes) -> None:
        """See `Channel.send`."""
        self._calls.append(asyncio.run_coroutine_threadsafe(self._call(frame), self._loop))

    def receive(self, deadline: float) -> Frame:
        """See `Channel.receive`."""
        try:
            frame = self._calls.pop(0).result(max(0.0, deadline - time.monotonic()))
        except FutureTimeoutError as error:
            raise ExchangeError("late", "no answer in time") from error
        except Exception as error:  # whatever a call through Serve may raise
            raise ExchangeError("gone", f"the call failed: {error!r}") from error
        return Frame(decode_header(frame[:HEADER_BYTES]), frame[HEADER_BYTES:])

    def close(self) -> None:
        """See `Channel.close`."""
        for call in self._calls:
            call.cancel()

    async def _call(self, frame: bytes) -> bytes:
        return await self._exchange.remote(self._caller, self._target, frame)
