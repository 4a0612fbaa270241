"""How a target comes to a draft, and stays with it: a lease from Serve, and a connection of its own beside it.

The lease is a streaming call that lasts as long as the two work together. Serve routes it to a replica, counts it for
autoscaling, and ends it with either side. Its first and only item is an address and a key, with which the target connects;
what the two say to each other every round then needs no Serve.
"""

import asyncio
import logging
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import ray
from ray.serve.handle import DeploymentHandle

from serve.config import DraftModelConfig, ExchangeConfig
from specdecode.exchange.channel import Frame, TcpChannel
from specdecode.exchange.frames import HEADER_BYTES, decode_header
from specdecode.exchange.messages import ExchangeError, ModelTokens
from specdecode.exchange.remote import RemoteDrafter

logger = logging.getLogger("ray.serve")

_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Offer:
    """What a lease offers: where to connect, and the key to show there."""

    host: str
    port: int
    key: bytes = field(repr=False)


class LeaseKeeper:
    """Keeps one drafter connected, whatever happens to the draft's replicas.

    Args:
        drafter: who drafts over the connection.
        handle: the draft's deployment.
        target: the model that is drafted for.
        config: of the draft.
        exchange: how the two talk.
    """

    def __init__(
        self,
        drafter: RemoteDrafter,
        handle: DeploymentHandle,
        target: ModelTokens,
        config: DraftModelConfig,
        exchange: ExchangeConfig,
    ) -> None:
        self._drafter = drafter
        # Over gRPC a draft notices when its target's process is gone; over Ray's actor calls it does not.
        self._lease = handle.options(method_name="lease", stream=True, _by_reference=False)
        self._exchange = handle.options(method_name="exchange")
        self._target = target
        self._config = config
        self._is_tcp = exchange.transport == "tcp"
        self._tls = exchange.tls.client_context() if exchange.tls else None

    async def keep(self) -> None:
        """Holds one lease after the other, for ever."""
        while True:
            try:
                error = await (self._hold_lease() if self._is_tcp else self._hold_handle())
                logger.warning("draft %s: the lease has ended: %s", self._drafter.name, error)
            except Exception as error:  # a draft that cannot be had now may be had later, and costs speed until then
                logger.warning("draft %s: no lease: %r", self._drafter.name, error)
            await asyncio.sleep(self._config.retry_after_s)

    async def _hold_lease(self) -> object:
        """Holds a lease to its end; returns why it ended."""
        lease = self._lease.remote(ray.get_runtime_context().get_node_id())
        try:
            offer: Offer = await anext(lease)
            address = (offer.host, offer.port)
            channel = await asyncio.to_thread(
                TcpChannel.connect, address, offer.key, self._target, _CONNECT_TIMEOUT_S, self._tls
            )
            logger.info("draft %s: leased at %s:%d", self._drafter.name, *address)
            lost = asyncio.wrap_future(self._drafter.connect(channel))
            ended = asyncio.create_task(_rest(lease))
            try:
                ends: set[asyncio.Future[Any]] = {lost, ended}
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ended.cancel()
            return lost.result() if lost.done() else "by the draft"
        finally:
            self._drafter.disconnect()
            lease.cancel()

    async def _hold_handle(self) -> object:
        channel = HandleChannel(self._exchange, self._target, asyncio.get_running_loop())
        return await asyncio.wrap_future(self._drafter.connect(channel))


class HandleChannel:
    """A channel that is a Serve handle: every round is a call. What the connection of a lease is measured against."""

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


async def _rest(lease: Any) -> None:
    """Waits for the end of a lease, however it comes."""
    with suppress(Exception):
        async for _ in lease:
            pass
