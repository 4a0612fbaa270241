"""A target that connects to what is no draft is told so in time."""

import socket
import struct
import threading
import time

import pytest

from specdecode.exchange.channel import TcpChannel
from specdecode.exchange.frames import (
    KEY_BYTES,
    MAX_FRAME_BYTES,
    Kind,
    encode,
)
from specdecode.exchange.messages import ExchangeError
from tests.exchange.conftest import HOST
from tests.exchange.pairs import (
    TOKENS,
)
from tests.exchange.peers import free_port

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_nobody_at_an_address_is_gone() -> None:
    with pytest.raises(ExchangeError, match=r"no connection to 127\.0\.0\.1") as caught:
        TcpChannel.connect((HOST, free_port()), bytes(KEY_BYTES), TOKENS, 5.0)
    assert caught.value.cause == "gone"


def test_somebody_who_says_nothing_is_late() -> None:
    with socket.create_server((HOST, 0)) as silent:
        started = time.monotonic()
        with pytest.raises(ExchangeError) as caught:
            TcpChannel.connect(silent.getsockname(), bytes(KEY_BYTES), TOKENS, 0.3)
        assert caught.value.cause == "late"
        assert 0.2 < time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "garbled"),
        (b"SPDC\x07\x02" + b"\0" * 10, "refused"),
        (b"SPDC\x01\x02" + b"\0" * 6 + struct.pack("<I", MAX_FRAME_BYTES + 1), "refused"),
        (encode(Kind.REFUSAL, b"go away"), "refused"),
        (encode(Kind.REFUSAL), "refused"),
        (encode(Kind.WELCOME)[:10], "gone"),
        (b"", "gone"),
    ],
    ids=range(7),
)
def test_somebody_else_at_an_address_is_no_draft(said: bytes, cause: str) -> None:
    with socket.create_server((HOST, 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):  # to its end, or what was said could be lost
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ExchangeError) as caught:
            TcpChannel.connect(server.getsockname(), bytes(KEY_BYTES), TOKENS, 5.0)
        assert caught.value.cause == cause
        thread.join()
