"""A draft whose connections run through a proxy, which does to their frames what it is told to: for the drills."""

import asyncio
import secrets
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from ray.serve import Application

from serve.app import wire
from serve.config import DraftModelConfig, ExchangeConfig, ServeConfig
from serve.draft import DraftServer
from serve.lease import Offer
from specdecode.exchange.frames import HEADER_BYTES, VERSION, Kind, decode_header
from specdecode.exchange.messages import ExchangeError

Trouble = Literal[
    "delay reply",
    "lose request",
    "lose reply",
    "repeat request",
    "repeat reply",
    "garble reply",
    "change version",
    "withhold replies",
    "reset in mid-frame",
]
TROUBLES: tuple[Trouble, ...] = get_args(Trouble)

_OF_REQUESTS: set[Trouble] = {"lose request", "repeat request"}
_VERSION_PLACE = 4  # in a frame, after the magic
_RESET_WHEN_CLOSED = struct.pack("ii", 1, 0)  # SO_LINGER with no time to linger


def build(config: ServeConfig) -> Application:
    """The same as `serve.app:build`, with drafts that interfere."""
    return wire(config, {}, InterferingDraft)


class InterferingDraft(DraftServer):
    """A draft server that offers the address of a proxy instead of its own."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, name: str, config: DraftModelConfig, exchange: ExchangeConfig
    ) -> None:
        await super().__init__(name, config, exchange)
        self._proxy = Proxy()

    async def lease(self, node_id: str) -> AsyncIterator[Offer]:
        """See `DraftServer.lease`."""
        async with aclosing(super().lease(node_id)) as lease:  # type: ignore[type-var]
            async for offer in lease:
                yield replace(offer, port=await self._proxy.open(offer.host, offer.port))

    async def interfere(self, pid: int, trouble: Trouble, delay_s: float, timeout_s: float) -> bool:
        """Does that to the next frame of the replica in process `pid`; returns whether there was one in time."""
        if (await self.inspect()).pid != pid:
            return False
        return await self._proxy.interfere(trouble, delay_s, timeout_s)


@dataclass(eq=False)
class _Order:
    """What to do to one frame; `begun` is set when it is done."""

    trouble: Trouble
    delay_s: float
    begun: asyncio.Event


class Proxy:
    """Carries frames between targets and a listener."""

    def __init__(self) -> None:
        self._servers: dict[tuple[str, int], asyncio.Server] = {}
        self._order: _Order | None = None

    async def open(self, host: str, port: int) -> int:
        """Listens for those who want to reach that address; returns at which port."""
        if (host, port) not in self._servers:
            self._servers[host, port] = await asyncio.start_server(partial(self._serve, host, port), host, 0)
        address: tuple[str, int] = self._servers[host, port].sockets[0].getsockname()[:2]
        return address[1]

    async def interfere(self, trouble: Trouble, delay_s: float, timeout_s: float) -> bool:
        """Does that to the next frame that it can be done to; returns whether there was one in time."""
        order = self._order = _Order(trouble, delay_s, asyncio.Event())
        try:
            await asyncio.wait_for(order.begun.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        finally:
            if self._order is order:
                self._order = None
        return True

    def close(self) -> None:
        """Listens no more."""
        for server in self._servers.values():
            server.close()

    async def _serve(self, host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carries both ways until one of the two ends."""
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.close()
            return
        ways = [asyncio.create_task(self._carry(reader, far_writer)), asyncio.create_task(self._carry(far_reader, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            writer.close()
            far_writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError, ExchangeError):
            while True:
                head = await reader.readexactly(HEADER_BYTES)
                header = decode_header(head)
                frame = head + await reader.readexactly(header.num_bytes)
                order = self._take(header.kind)
                if order is None:
                    writer.write(frame)
                else:
                    order.begun.set()
                    await _spoil(order, frame, writer, reader)
                await writer.drain()

    def _take(self, kind: Kind) -> _Order | None:
        """The order, if it is for frames of this kind; it is carried out once."""
        order = self._order
        if order is None or kind != (Kind.REQUEST if order.trouble in _OF_REQUESTS else Kind.REPLY):
            return None
        self._order = None
        return order


async def _spoil(order: _Order, frame: bytes, writer: asyncio.StreamWriter, reader: asyncio.StreamReader) -> None:
    match order.trouble:
        case "delay reply":
            await asyncio.sleep(order.delay_s)
            writer.write(frame)
        case "lose request" | "lose reply":
            pass
        case "repeat request" | "repeat reply":
            writer.write(frame + frame)
        case "garble reply":
            writer.write(secrets.token_bytes(len(frame)))
        case "change version":
            writer.write(frame[:_VERSION_PLACE] + bytes([VERSION + 1]) + frame[_VERSION_PLACE + 1 :])
        case "withhold replies":
            while await reader.read(1 << 16):
                pass
        case "reset in mid-frame":
            writer.write(frame[: len(frame) // 2])
            await writer.drain()
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_WHEN_CLOSED)
            writer.transport.abort()
