"""Whoever connects to a draft, rightly or wrongly, and what is seen of it."""

import asyncio
import socket
import threading

from specdecode.decoding.drafters import ModelDrafter
from specdecode.exchange.channel import TcpChannel
from specdecode.exchange.connection import Limits
from specdecode.exchange.frames import (
    HEADER_BYTES,
    Kind,
    decode_header,
    decode_reply,
)
from specdecode.exchange.messages import Answer
from specdecode.exchange.remote import RemoteDrafter
from tests.exchange.conftest import HOST, Leasing, wait_until
from tests.exchange.pairs import (
    COUPLED,
    DRAFT,
    GREEDY,
    SAMPLED,
    TARGET,
    TOKENS,
    VOCAB_SIZE,
    varied,
)

IMPATIENT = Limits(hello_timeout_s=0.3)
EVERY = GREEDY + SAMPLED + COUPLED


def drafter_over(channel: TcpChannel) -> RemoteDrafter:
    drafter = RemoteDrafter("test", VOCAB_SIZE, deadline_s=30.0)
    drafter.connect(channel)
    return drafter


def stranger(leasing: Leasing) -> socket.socket:
    """A connection that has not said anything yet."""
    connection = socket.create_connection(leasing.address, 10)
    connection.settimeout(10)
    return connection


def answer_to(connection: socket.socket) -> bytes:
    """All that comes until the connection is closed."""
    parts = []
    with connection:
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def refusal(said: bytes) -> str:
    """What the other side gives as its reason, which is all that it says."""
    header = decode_header(said[:HEADER_BYTES])
    assert header.kind == Kind.REFUSAL
    assert header.num_bytes == len(said) - HEADER_BYTES
    return said[HEADER_BYTES:].decode()


def assert_still_works(leasing: Leasing) -> None:
    """And nothing is left of those who came before."""
    wait_until(lambda: leasing.listener.num_sessions == 0)
    assert leasing.listener.is_alive
    drafter = drafter_over(leasing.connect())
    here = ModelDrafter(DRAFT, eos_token_ids=TARGET.eos_token_ids)
    sequences = varied(GREEDY)
    assert [d.tokens for d in drafter.propose(sequences)] == [d.tokens for d in here.propose(sequences)]
    drafter.disconnect()
    wait_until(lambda: leasing.listener.num_sessions == 0)
    assert_forgotten(leasing)


def assert_forgotten(leasing: Leasing) -> None:
    schedule = leasing.scheduler
    wait_until(lambda: (schedule.num_sessions, schedule.num_sequences, schedule.num_pending) == (0, 0, 0))


def free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def call(leasing: Leasing, caller: str, frame: bytes) -> list[Answer]:
    reply = asyncio.run(leasing.listener.call(caller, TOKENS, frame))
    header = decode_header(reply[:HEADER_BYTES])
    assert header.kind == Kind.REPLY
    return decode_reply(header.round, reply[HEADER_BYTES:], VOCAB_SIZE).answers


class Gate:
    """Where a pass of the draft stops, until it is let on."""

    def __init__(self) -> None:
        self.reached, self.resumed = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        self.resumed.wait(10)
