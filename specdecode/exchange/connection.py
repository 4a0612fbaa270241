"""Bytes of one target's connection in, requests out; replies in, bytes out. Knows no thread and no model.

Until it has shown its key a connection is a stranger, which may say little and must say it soon. Then every frame is a request.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Any, Protocol

from specdecode.errors import SpecDecodeError
from specdecode.exchange.channel import tune
from specdecode.exchange.frames import (
    HEADER_BYTES,
    KEY_BYTES,
    Header,
    Kind,
    decode_header,
    decode_hello,
    decode_request,
    encode,
)
from specdecode.exchange.messages import ExchangeError, ModelTokens, Request

logger = logging.getLogger("specdecode.exchange")

_MAX_HELLO_BYTES = 1 << 16
_MAX_UNANSWERED = 8  # a target waits for its reply; a few more than one is a network that repeats itself


@dataclass(frozen=True)
class Limits:
    """What is granted to those who connect.

    Attributes:
        max_sessions: how many targets have a session at a time.
        max_strangers: how many connections may be open that have not shown a key yet.
        max_frame_bytes: the longest request.
        max_unsent_bytes: how much may wait for a target that does not read its replies.
        hello_timeout_s: how long a connection may take to show its key, and a key waits for its connection.
    """

    max_sessions: int = 64
    max_strangers: int = 64
    max_frame_bytes: int = 16 << 20
    max_unsent_bytes: int = 32 << 20
    hello_timeout_s: float = 5.0


class Host(Protocol):
    """Whoever the connections belong to."""

    limits: Limits

    def met(self, connection: "Connection") -> None:
        """A stranger has come.

        Raises:
            ExchangeError: there are too many.
        """
        ...

    def claimed(self, connection: "Connection", key: bytes) -> None:
        """A stranger has shown a key.

        Raises:
            ExchangeError: it was not given out, or was shown before.
        """
        ...

    def introduced(self, connection: "Connection", target: ModelTokens) -> None:
        """A target has said who it is.

        Raises:
            ModelError: the draft does not fit it.
        """
        ...

    def asked(self, connection: "Connection", request: Request) -> None:
        """A request has come.

        Raises:
            ExchangeError: it contradicts itself.
        """
        ...

    def lost(self, connection: "Connection") -> None:
        """A connection has ended, whether it ever showed a key or not."""
        ...


class Connection(asyncio.Protocol):
    """One connection, from its first byte to its end.

    Args:
        host: whom it belongs to.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._received = bytearray()
        self._header: Header | None = None
        self._is_known = False
        self._num_unanswered = 0

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        self._transport: asyncio.Transport = transport
        tune(transport.get_extra_info("socket"))
        late = "expected a hello, got none in time"
        self._timer = asyncio.get_running_loop().call_later(self._host.limits.hello_timeout_s, self._refuse, late)
        try:
            self._host.met(self)
        except ExchangeError as error:
            self._refuse(str(error))

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._received += data
        try:
            while not self._transport.is_closing() and self._has_frame():
                self._take()
        except SpecDecodeError as error:
            self._refuse(str(error))

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002  asyncio says why, which is all one
        """See `asyncio.Protocol`."""
        self._timer.cancel()
        self._host.lost(self)

    def reply(self, frame: bytes) -> None:
        """Sends the reply to a request; a target that does not read them is given up."""
        self._num_unanswered -= 1
        self._transport.write(frame)
        if self._transport.get_write_buffer_size() > self._host.limits.max_unsent_bytes:
            logger.warning("a target does not read its replies: its session ends")
            self._transport.abort()

    def close(self) -> None:
        """Ends the connection; what is not read by the other side soon is dropped."""
        if not self._transport.is_closing():
            self._transport.close()
            self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(self._host.limits.hello_timeout_s, self._transport.abort)

    def abort(self) -> None:
        """Ends the connection at once."""
        self._transport.abort()

    def _has_frame(self) -> bool:
        """Whether a whole frame has come; its header is checked as soon as it is there."""
        if self._header is None and len(self._received) >= HEADER_BYTES:
            limit = self._host.limits.max_frame_bytes if self._is_known else _MAX_HELLO_BYTES
            self._header = decode_header(bytes(self._received[:HEADER_BYTES]), limit)
            expected = Kind.REQUEST if self._is_known else Kind.HELLO
            if self._header.kind != expected:
                raise ExchangeError("garbled", f"expected a {expected.name.lower()}, got a {self._header.kind.name.lower()}")
        return self._header is not None and len(self._received) >= HEADER_BYTES + self._header.num_bytes

    def _take(self) -> None:
        """Does what the first frame says."""
        assert self._header is not None
        header, self._header = self._header, None
        end = HEADER_BYTES + header.num_bytes
        payload = bytes(self._received[HEADER_BYTES:end])
        del self._received[:end]
        if self._is_known:
            self._num_unanswered += 1
            if self._num_unanswered > _MAX_UNANSWERED:
                raise ExchangeError("refused", f"more than {_MAX_UNANSWERED} requests at a time")
            self._host.asked(self, decode_request(header.round, payload))
            return
        self._timer.cancel()
        self._host.claimed(self, payload[:KEY_BYTES])
        self._host.introduced(self, decode_hello(payload))
        self._is_known = True
        self._transport.write(encode(Kind.WELCOME))

    def _refuse(self, reason: str) -> None:
        logger.warning("a target's connection is refused: %s", reason)
        self._transport.write(encode(Kind.REFUSAL, reason.encode()))
        self.close()
