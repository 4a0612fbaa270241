"""Frames one way, frames back: the ways to a draft. Knows nothing of what the frames say.

`TcpChannel` is the one that is used between processes, and the quickest; `InProcessChannel` is its twin without a socket.
"""

import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from specdecode.exchange.frames import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    Header,
    Kind,
    decode_header,
    decode_request,
    encode_hello,
    encode_reply,
)
from specdecode.exchange.messages import ExchangeError, ModelTokens
from specdecode.exchange.scheduler import DraftScheduler, Session

_SEND_TIMEOUT_S = 1.0  # a draft that takes nothing of a request for so long is not there
_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Frame:
    """A header and what comes after it."""

    header: Header
    payload: bytes


class Channel(Protocol):
    """A way to a draft, for one target."""

    def send(self, frame: bytes) -> None:
        """Sends a frame.

        Raises:
            ExchangeError: the way is gone.
        """
        ...

    def receive(self, deadline: float) -> Frame:
        """Waits for a frame, until `deadline` on the clock of `time.monotonic`.

        Raises:
            ExchangeError: none came in time, the way is gone, or what came is no frame.
        """
        ...

    def close(self) -> None:
        """Gives the way up; once is enough, and more does no harm."""
        ...


def tune(connection: socket.socket) -> None:
    """Has small frames sent at once, and a peer that vanished without a word noticed within a minute."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


class TcpChannel:
    """A connection to a `Listener`. Blocking: it is meant for the thread that decodes.

    Args:
        connection: a connected socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._received = bytearray()

    @staticmethod
    def connect(
        address: tuple[str, int], key: bytes, target: ModelTokens, timeout_s: float, tls: ssl.SSLContext | None = None
    ) -> "TcpChannel":
        """Connects, and claims the session of that key.

        Raises:
            ExchangeError: nobody answers there, or not in time, or it refuses.
        """
        deadline = time.monotonic() + timeout_s
        try:
            connection = socket.create_connection(address, timeout_s)
            tune(connection)
            if tls is not None:
                connection = tls.wrap_socket(connection, server_hostname=address[0])
        except OSError as error:  # ssl.SSLError is one
            raise ExchangeError("gone", f"no connection to {address[0]}:{address[1]}: {error}") from error
        channel = TcpChannel(connection)
        try:
            channel.send(encode_hello(key, target))
            answer = channel.receive(deadline)
            if answer.header.kind != Kind.WELCOME:
                raise ExchangeError("refused", answer.payload.decode(errors="replace") or "refused without a reason")
        except ExchangeError:
            channel.close()
            raise
        return channel

    def send(self, frame: bytes) -> None:
        """See `Channel.send`."""
        try:
            self._socket.settimeout(_SEND_TIMEOUT_S)  # what is left of the last answer's time may be next to nothing
            self._socket.sendall(frame)
        except OSError as error:
            raise ExchangeError("gone", f"the connection ended: {error}") from error

    def receive(self, deadline: float) -> Frame:
        """See `Channel.receive`."""
        self._read(HEADER_BYTES, deadline)
        header = decode_header(bytes(self._received[:HEADER_BYTES]), MAX_FRAME_BYTES)
        end = HEADER_BYTES + header.num_bytes
        self._read(end, deadline)
        payload = bytes(self._received[HEADER_BYTES:end])
        del self._received[:end]
        return Frame(header, payload)

    def close(self) -> None:
        """See `Channel.close`; a thread that waits for a frame is woken."""
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # a TLS socket's own must not be called from another thread
        self._socket.close()

    def _read(self, count: int, deadline: float) -> None:
        """Waits until so many bytes have come."""
        while len(self._received) < count:
            try:
                self._socket.settimeout(max(1e-4, deadline - time.monotonic()))
                data = self._socket.recv(_READ_BYTES)
            except TimeoutError as error:
                raise ExchangeError("late", "no answer in time") from error
            except OSError as error:
                raise ExchangeError("gone", f"the connection ended: {error}") from error
            if not data:
                raise ExchangeError("gone", "the connection was closed")
            self._received += data


class InProcessChannel:
    """A channel to a scheduler in this process: what waits for a reply makes the scheduler work. For tests and comparisons.

    Args:
        scheduler: the draft's.
        target: the model that is drafted for.
        disturb: is given every frame on its way, both ways, and returns those that arrive.
    """

    def __init__(
        self, scheduler: DraftScheduler, target: ModelTokens, disturb: Callable[[bytes], list[bytes]] = lambda frame: [frame]
    ) -> None:
        self.scheduler = scheduler
        self._session = scheduler.open(target)
        self._disturb = disturb
        self._arrived: deque[bytes] = deque()

    def send(self, frame: bytes) -> None:
        """See `Channel.send`."""
        for arrived in self._disturb(frame):
            header = decode_header(arrived[:HEADER_BYTES])
            self.scheduler.submit(self._session, decode_request(header.round, arrived[HEADER_BYTES:]))

    def receive(self, deadline: float) -> Frame:
        """See `Channel.receive`."""
        while not self._arrived:
            if not self.scheduler.num_pending or time.monotonic() > deadline:
                raise ExchangeError("late", "no answer in time")
            self.work()
        frame = self._arrived.popleft()
        return Frame(decode_header(frame[:HEADER_BYTES]), frame[HEADER_BYTES:])

    def work(self) -> None:
        """Lets the scheduler do a step, as it would meanwhile in a process of its own."""
        for session, reply in self.scheduler.step():
            _deliver(session, self._session, self._arrived, self._disturb(encode_reply(reply)))

    def close(self) -> None:
        """See `Channel.close`."""
        self.scheduler.close(self._session)


def _deliver(session: Session, own: Session, arrived: deque[bytes], frames: list[bytes]) -> None:
    assert session is own, "a scheduler that is shared needs a clock of its own"
    arrived.extend(frames)
