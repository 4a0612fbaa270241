"""Connections in, a scheduler's replies out: the draft's end of every `TcpChannel`.

One thread does all of it: it reads what has come, lets the scheduler do a step, sends what is due, and begins again. Between
two steps nothing can change, so nothing needs a lock. Who wants to connect must hold a key, which is given out through
`Listener.admit` to somebody who is trusted already; see docs/security.md for what a stranger can do, which is little.
"""

import asyncio
import errno
import hmac
import logging
import secrets
import ssl
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from specdecode.errors import ConfigError
from specdecode.exchange.connection import Connection, Limits
from specdecode.exchange.frames import HEADER_BYTES, KEY_BYTES, Kind, decode_header, decode_request, encode_reply
from specdecode.exchange.messages import ExchangeError, ModelTokens, Request
from specdecode.exchange.scheduler import DraftScheduler, Session

logger = logging.getLogger("specdecode.exchange")

T = TypeVar("T")


@dataclass(eq=False)
class Ticket:
    """The right to one session.

    Attributes:
        key: what the target shows.
        ended: is done when the session is over.
        connection: who has shown the key.
    """

    key: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES), repr=False)
    ended: "Future[None]" = field(default_factory=Future)
    connection: Connection | None = None


class Listener:
    """Listens on a thread of its own until it is closed.

    Args:
        scheduler: the draft's; from now on only that thread touches it.
        limits: what is granted.
        tls: the certificate to show; plain TCP if None.
    """

    def __init__(self, scheduler: DraftScheduler, limits: Limits | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.scheduler = scheduler
        self.limits = limits or Limits()
        self._tls = tls
        self._tickets: list[Ticket] = []
        self._sinks: dict[Session, Callable[[bytes], None]] = {}  # where the replies of each session go
        self._callers: OrderedDict[str, Session] = OrderedDict()
        self._connections: dict[Connection, Ticket | None] = {}  # None for strangers
        self._sessions: dict[Connection, Session] = {}
        self._servers: dict[str, asyncio.Server] = {}
        self._is_opening = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        self._is_stepping = False
        self._thread = threading.Thread(target=self._run, name="exchange", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def num_sessions(self) -> int:
        """How many keys are given out, whether they were shown yet or not."""
        return len(self._tickets)

    def listen(self, host: str, ports: range | None = None) -> tuple[str, int]:
        """Listens at an address, on the first free one of `ports`, or any; returns where. Once for each host is enough.

        Raises:
            ConfigError: nothing can be listened to there.
            ExchangeError: the thread has ended.
        """
        return self._run_there(self._listen(host, ports)).result()

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[Ticket]:
        """Gives a key out, for as long as the context lasts; leaving it ends the session. For any event loop.

        Raises:
            ExchangeError: there are too many sessions, or the thread has ended.
        """
        ticket = Ticket()
        await asyncio.wrap_future(self._run_there(self._add(ticket)))
        try:
            yield ticket
        finally:
            with suppress(RuntimeError):  # the thread has ended, and the session with it
                self._loop.call_soon_threadsafe(self._end, ticket)

    async def call(self, caller: str, target: ModelTokens, frame: bytes) -> bytes:
        """Answers a frame that did not come over a connection, of somebody who is trusted. For any event loop.

        Raises:
            ExchangeError: it is no request, it is not answered in time, or the thread has ended.
        """
        return await asyncio.wrap_future(self._run_there(self._call(caller, target, frame)))

    async def inspect(self, look: Callable[[DraftScheduler], T]) -> T:
        """Lets `look` see the scheduler between two of its steps. For any event loop."""

        async def between() -> T:
            return look(self.scheduler)

        return await asyncio.wrap_future(self._run_there(between()))

    def close(self) -> None:
        """Ends every session and the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._wind_up())
            self._loop.close()

    async def _wind_up(self) -> None:
        """Closes all that listens or is connected, and ends all that goes on."""
        for server in self._servers.values():
            server.close()
        for ticket in list(self._tickets):
            self._end(ticket)
        for connection in list(self._connections):
            connection.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports end, and who waits for a task is told, one turn later

    def _run_there(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Has the thread run a coroutine."""
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as error:
            coroutine.close()
            raise ExchangeError("gone", "the thread that drafts has ended") from error

    def met(self, connection: Connection) -> None:
        """See `Host.met`."""
        num_strangers = sum(ticket is None for ticket in self._connections.values())
        self._connections[connection] = None
        if num_strangers >= self.limits.max_strangers:
            raise ExchangeError("refused", "too many connections without a key")

    def claimed(self, connection: Connection, key: bytes) -> None:
        """See `Host.claimed`."""
        found = [ticket for ticket in self._tickets if hmac.compare_digest(ticket.key, key)]
        if not found or found[0].connection is not None:
            raise ExchangeError("refused", "expected a key that was given out and not used yet")
        self._connections[connection] = found[0]
        found[0].connection = connection

    def introduced(self, connection: Connection, target: ModelTokens) -> None:
        """See `Host.introduced`."""
        session = self._sessions[connection] = self.scheduler.open(target)
        self._sinks[session] = connection.reply

    def asked(self, connection: Connection, request: Request) -> None:
        """See `Host.asked`."""
        self._submit(self._sessions[connection], request)

    def lost(self, connection: Connection) -> None:
        """See `Host.lost`."""
        ticket = self._connections.pop(connection, None)
        if session := self._sessions.pop(connection, None):
            self._drop(session)
        if ticket is not None:
            self._end(ticket)

    def _submit(self, session: Session, request: Request) -> None:
        self.scheduler.submit(session, request)
        if not self._is_stepping:
            self._is_stepping = True
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        """Lets the scheduler do one step; the next one comes when what has arrived meanwhile is read."""
        try:
            for session, reply in self.scheduler.step():
                if session in self._sinks:
                    self._sinks[session](encode_reply(reply))
        except Exception:  # what broke one batch must not end the draft
            logger.exception("a pass of the draft model failed; its sessions end with it")
            for session in list(self._sinks):
                self._drop(session)
            for connection in list(self._sessions):
                connection.abort()
        self._is_stepping = self.scheduler.has_work
        if self._is_stepping:
            self._loop.call_soon(self._step)

    async def _listen(self, host: str, ports: range | None) -> tuple[str, int]:
        async with self._is_opening:
            if host not in self._servers:
                self._servers[host] = await self._open_server(host, ports or range(1))
        address: tuple[str, int] = self._servers[host].sockets[0].getsockname()[:2]
        return address

    async def _open_server(self, host: str, ports: range) -> asyncio.Server:
        for port in ports:
            try:
                return await self._loop.create_server(lambda: Connection(self), host, port, **self._security())
            except OSError as error:  # noqa: PERF203  one port after the other
                if error.errno != errno.EADDRINUSE:
                    raise ConfigError(f"exchange: cannot listen on {host}:{port}: {error.strerror}") from error
        raise ConfigError(f"exchange.ports: expected a free one on {host}, got {ports} all in use")

    def _security(self) -> dict[str, Any]:
        return {"ssl": self._tls, "ssl_handshake_timeout": self.limits.hello_timeout_s} if self._tls else {}

    async def _add(self, ticket: Ticket) -> None:
        if len(self._tickets) >= self.limits.max_sessions:
            raise ExchangeError("refused", f"there are {len(self._tickets)} sessions already")
        self._tickets.append(ticket)
        self._loop.call_later(self.limits.hello_timeout_s, self._expire, ticket)

    def _expire(self, ticket: Ticket) -> None:
        if ticket.connection is None:
            self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        if ticket in self._tickets:
            self._tickets.remove(ticket)
        if ticket.connection is not None:
            ticket.connection.close()
        if not ticket.ended.done():
            ticket.ended.set_result(None)

    async def _call(self, caller: str, target: ModelTokens, frame: bytes) -> bytes:
        header = decode_header(frame[:HEADER_BYTES], self.limits.max_frame_bytes)
        if header.kind != Kind.REQUEST or header.num_bytes != len(frame) - HEADER_BYTES:
            raise ExchangeError("garbled", f"expected a whole request, got {header} in {len(frame)} bytes")
        request = decode_request(header.round, frame[HEADER_BYTES:])
        session = self._callers.pop(caller, None)
        if session is None or session not in self._sinks:  # a pass that failed has ended it
            session = self.scheduler.open(target)
        self._callers[caller] = session
        while len(self._callers) > self.limits.max_sessions:
            self._drop(self._callers.popitem(last=False)[1])
        reply: asyncio.Future[bytes] = self._loop.create_future()
        self._sinks[session] = lambda frame: None if reply.done() else reply.set_result(frame)
        self._submit(session, request)
        try:
            return await asyncio.wait_for(reply, request.patience_s)
        except asyncio.TimeoutError as error:
            raise ExchangeError("late", "no answer in time") from error

    def _drop(self, session: Session) -> None:
        self._sinks.pop(session, None)
        self.scheduler.close(session)
