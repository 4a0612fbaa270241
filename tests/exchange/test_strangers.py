"""Whoever comes without a key, and whatever they do, is refused soon and leaves nothing behind."""

import random
import socket
import struct
import time

import pytest

from specdecode.exchange.connection import Limits
from specdecode.exchange.frames import (
    HEADER_BYTES,
    KEY_BYTES,
    Kind,
    encode,
    encode_hello,
    encode_request,
)
from specdecode.exchange.messages import ExchangeError, Request
from tests.exchange.conftest import Leasing, wait_until
from tests.exchange.pairs import (
    TOKENS,
    plain,
)
from tests.exchange.peers import IMPATIENT, answer_to, assert_still_works, drafter_over, refusal, stranger

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_a_wrong_key_is_refused() -> None:
    with Leasing() as leasing:
        ticket = leasing.admit()
        for key in (bytes(KEY_BYTES), ticket.key[:-1] + b"\0" if ticket.key[-1] else ticket.key[:-1] + b"\1"):
            with pytest.raises(ExchangeError, match="expected a key that was given out") as caught:
                leasing.connect(key)
            assert caught.value.cause == "refused"
        assert not ticket.ended.done()
        leasing.connect(ticket.key).close()
        assert_still_works(leasing)


def test_a_key_opens_one_session() -> None:
    with Leasing() as leasing:
        ticket = leasing.admit()
        first = leasing.connect(ticket.key)
        with pytest.raises(ExchangeError, match="not used yet"):
            leasing.connect(ticket.key)
        drafter = drafter_over(first)
        assert len(drafter.propose([plain([1])])[0].tokens) == 4  # whoever came first is not disturbed
        drafter.disconnect()
        ticket.ended.result(10)
        with pytest.raises(ExchangeError, match="expected a key"):
            leasing.connect(ticket.key)
        assert_still_works(leasing)


def test_a_key_that_nobody_shows_expires() -> None:
    with Leasing(IMPATIENT) as leasing:
        ticket = leasing.admit()
        assert leasing.listener.num_sessions == 1
        ticket.ended.result(10)
        assert leasing.listener.num_sessions == 0
        with pytest.raises(ExchangeError, match="expected a key that was given out"):
            leasing.connect(ticket.key)


def test_a_key_that_was_shown_in_time_does_not_expire() -> None:
    with Leasing(IMPATIENT) as leasing:
        ticket = leasing.admit()
        drafter = drafter_over(leasing.connect(ticket.key))
        time.sleep(0.6)
        assert not ticket.ended.done()
        assert len(drafter.propose([plain([1])])[0].tokens) == 4
        drafter.disconnect()
        assert_still_works(leasing)


@pytest.mark.parametrize(
    "begun", [b"", b"S", encode_hello(bytes(KEY_BYTES), TOKENS)[:HEADER_BYTES], encode_hello(bytes(KEY_BYTES), TOKENS)[:-1]]
)
def test_a_connection_that_says_no_whole_hello_is_closed_in_time(begun: bytes) -> None:
    with Leasing(IMPATIENT) as leasing:
        connection, started = stranger(leasing), time.monotonic()
        connection.sendall(begun)
        assert "none in time" in refusal(answer_to(connection))
        assert 0.2 < time.monotonic() - started < 5
        assert_still_works(leasing)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"GET / HTTP/1.1\r\nHost: draft\r\n\r\n", "begins with b'SPDC', got b'GET '"),
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + b"x" * 99, "begins with b'SPDC'"),  # TLS
        (b"SPDC\x63\x01" + b"\0" * 10, "expected version 1 of the protocol, got 99"),
        (b"SPDC\x01\x09" + b"\0" * 10, "expected a frame of kind"),
        (encode(Kind.WELCOME), "expected a hello"),
        (encode_request(Request(1, 1.0, [])), "expected a hello"),
        (encode(Kind.HELLO), "expected a key"),
        (encode(Kind.HELLO, b"x" * 5), "expected a key"),
        (encode(Kind.HELLO, b"x" * 60_000), "expected a key"),
        (b"SPDC\x01\x01" + b"\0" * 6 + struct.pack("<I", 1 << 20), "at most 65536 bytes, got 1048576"),
    ],
    ids=range(10),
)
def test_whatever_else_a_stranger_says_is_refused(said: bytes, message: str) -> None:
    with Leasing() as leasing:
        connection = stranger(leasing)
        connection.sendall(said)
        assert message in refusal(answer_to(connection))
        assert_still_works(leasing)


@pytest.mark.parametrize("about", [b"", b"{}", b"[1]", b"[" * 50_000, b'{"name": 1}', b"\xff" * 10])
def test_the_right_key_with_a_hello_that_says_nothing_is_refused(about: bytes) -> None:
    with Leasing(IMPATIENT) as leasing:
        connection = stranger(leasing)
        connection.sendall(encode(Kind.HELLO, leasing.admit().key + about))
        assert refusal(answer_to(connection))
        assert_still_works(leasing)


def test_a_stranger_that_goes_away_leaves_nothing() -> None:
    with Leasing() as leasing:
        for said in (b"", b"SPDC", encode(Kind.HELLO, b"x" * 50)[:40]):
            connection = stranger(leasing)
            connection.sendall(said)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        assert_still_works(leasing)


def test_garbage_of_any_kind_does_no_harm() -> None:
    rng = random.Random(0)
    with Leasing(IMPATIENT) as leasing:
        for number in range(40):
            connection = stranger(leasing)
            garbage = rng.randbytes(rng.randint(16, 400))
            connection.sendall(encode(rng.choice(list(Kind)), garbage) if number % 2 else garbage)
            connection.shutdown(socket.SHUT_WR)
            answer_to(connection)
        assert_still_works(leasing)


def test_too_many_strangers_are_turned_away_and_those_with_keys_get_in_later() -> None:
    with Leasing(Limits(max_strangers=3, hello_timeout_s=1.0)) as leasing:
        waiting = [stranger(leasing) for _ in range(3)]
        wait_until(lambda: len(leasing.listener._connections) == 3)
        with stranger(leasing) as one_more:
            assert "too many connections without a key" in refusal(answer_to(one_more))
        for connection in waiting:
            assert "none in time" in refusal(answer_to(connection))
        assert_still_works(leasing)


def test_there_are_no_more_sessions_than_are_granted() -> None:
    with Leasing(Limits(max_sessions=2)) as leasing:
        tickets = [leasing.admit() for _ in range(2)]
        with pytest.raises(ExchangeError, match="there are 2 sessions already") as caught:
            leasing.admit()
        assert caught.value.cause == "refused"
        for ticket in tickets:
            leasing.connect(ticket.key).close()
            ticket.ended.result(10)
        assert_still_works(leasing)
