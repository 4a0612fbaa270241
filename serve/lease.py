"""How a target comes to a draft, and stays with it: a lease from Serve, and a connection of its own beside it.

The lease is a streaming call that lasts as long as the two work together. Serve routes it to a replica, counts it for
autoscaling, and ends it with either side. Its first and only item is an address and a key, with which the target connects;
what the two say to each other every round then needs no Serve.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from serve.decoder import Offer

logger = logging.getLogger("ray.serve")


class LeaseKeeper:
    """Keeps one draft connected, whatever happens to its replicas.

    Args:
        name: the draft's.
        handle: its deployment.
        connect: has the target work with what was offered; returns why that ended, and ends it when it is cancelled.
        retry_after_s: how long nothing is asked after a failure.
    """

    def __init__(
        self, name: str, handle: DeploymentHandle, connect: Callable[[Offer], Awaitable[str]], retry_after_s: float
    ) -> None:
        self._name = name
        # Over gRPC a draft notices when its target's process is gone; over Ray's actor calls it does not.
        self._lease = handle.options(method_name="lease", stream=True, _by_reference=False)
        self._connect = connect
        self._retry_after_s = retry_after_s

    async def keep(self) -> None:
        """Holds one lease after the other, for ever."""
        while True:
            try:
                logger.warning("draft %s: the lease has ended: %s", self._name, await self._hold())
            except Exception as error:  # a draft that cannot be had now may be had later, and costs speed until then
                logger.warning("draft %s: no lease: %r", self._name, error)
            await asyncio.sleep(self._retry_after_s)

    async def _hold(self) -> str:
        """Holds a lease to its end; returns why it ended."""
        lease = self._lease.remote(ray.get_runtime_context().get_node_id())
        try:
            offer: Offer = await anext(lease)
            connected = asyncio.ensure_future(self._connect(offer))
            ended = asyncio.create_task(_rest(lease))
            ends: set[asyncio.Future[Any]] = {connected, ended}
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for end in ends:
                    end.cancel()
            return "by the draft" if connected.cancelled() or not connected.done() else connected.result()
        finally:
            lease.cancel()


async def _rest(lease: Any) -> None:
    """Waits for the end of a lease, however it comes."""
    with suppress(Exception):
        async for _ in lease:
            pass
