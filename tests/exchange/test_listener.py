"""Who holds a key is served where the draft listens, until either side ends; what is said wrongly ends a session."""

import asyncio
import socket
import struct
import threading
import time
from contextlib import suppress

import pytest

from specdecode.decoding.drafters import ModelDrafter
from specdecode.errors import ConfigError, ModelError
from specdecode.exchange.channel import TcpChannel
from specdecode.exchange.connection import Limits
from specdecode.exchange.frames import (
    Kind,
    decode_reply,
    encode,
    encode_request,
)
from specdecode.exchange.listener import Listener
from specdecode.exchange.messages import ExchangeError, Request
from tests.exchange.conftest import HOST, Leasing, wait_until
from tests.exchange.pairs import (
    VOCAB_SIZE,
    connected,
    decode,
    plain,
    scheduler,
    varied,
)
from tests.exchange.peers import (
    EVERY,
    Gate,
    assert_forgotten,
    assert_still_works,
    call,
    drafter_over,
    free_port,
    stranger,
)
from tests.exchange.test_scheduler import introducing

pytestmark = pytest.mark.usefixtures("nothing_is_left")


# Those who hold a key


def test_a_target_with_a_key_gets_drafts() -> None:
    with Leasing() as leasing:
        ticket = leasing.admit()
        drafter = drafter_over(leasing.connect(ticket.key))
        assert len(drafter.propose([plain([1])])[0].tokens) == 4
        assert leasing.listener.num_sessions == leasing.scheduler.num_sessions == 1
        drafter.disconnect()
        ticket.ended.result(10)
        assert_still_works(leasing)


@pytest.mark.parametrize("run_ahead", [False, True])
def test_two_targets_are_served_at_once_from_two_threads(run_ahead: bool) -> None:
    expected = decode(varied(EVERY, max_tokens=60), connected(scheduler(run_ahead=run_ahead))[0])
    with Leasing(run_ahead=run_ahead) as leasing:
        drafters = [drafter_over(leasing.connect()) for _ in range(2)]
        outputs: dict[int, list[list[int]]] = {}

        def work(number: int) -> None:
            outputs[number] = decode(varied(EVERY, max_tokens=60), drafters[number])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outputs == {0: expected, 1: expected}
        for drafter in drafters:
            assert not drafter.metrics.num_fallbacks
            drafter.disconnect()
        assert_still_works(leasing)


def test_a_draft_goes_on_while_nobody_asks() -> None:
    with Leasing(run_ahead=True) as leasing:
        drafter, sequence = drafter_over(leasing.connect()), plain([1])
        [draft] = drafter.propose([sequence])
        assert draft.continues
        wait_until(lambda: leasing.scheduler.metrics.num_ahead == 4)
        assert not leasing.scheduler.has_work
        sequence.tokens += draft.tokens
        [ahead] = drafter.propose([sequence])
        assert drafter.metrics.num_ahead == len(ahead.tokens) == 4
        drafter.disconnect()
        assert_forgotten(leasing)


def test_leaving_the_lease_ends_the_connection() -> None:
    async def lease_and_leave(leasing: Leasing) -> TcpChannel:
        async with leasing.listener.admit() as ticket:
            channel = await asyncio.to_thread(leasing.connect, ticket.key)
            assert leasing.listener.num_sessions == 1
            return channel

    with Leasing() as leasing:
        channel = asyncio.run(lease_and_leave(leasing))
        with pytest.raises(ExchangeError, match="closed") as caught:
            channel.receive(time.monotonic() + 10)
        assert caught.value.cause == "gone"
        channel.close()
        assert_still_works(leasing)


def test_a_client_that_vanishes_ends_its_lease_and_is_forgotten() -> None:
    with Leasing() as leasing:
        ticket = leasing.admit()
        channel = leasing.connect(ticket.key)
        drafter_over(channel).propose([plain([1]), plain([2])])
        assert (leasing.scheduler.num_sequences, ticket.ended.done()) == (2, False)
        # As when a process is killed: what is left unread makes the system reset the connection.
        channel._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        channel._socket.close()
        ticket.ended.result(10)
        assert leasing.listener.num_sessions == 0
        assert_forgotten(leasing)
        assert_still_works(leasing)


def test_a_client_that_vanishes_while_its_drafts_are_made_is_forgotten() -> None:
    gate = Gate()
    with Leasing() as leasing:
        leasing.before_pass = gate
        ticket = leasing.admit()
        channel = leasing.connect(ticket.key)
        channel.send(encode_request(Request(1, 30.0, [introducing(1, [1], k=50, ignore_eos=True)])))
        assert gate.reached.wait(10)
        channel.close()
        gate.resumed.set()
        ticket.ended.result(10)
        assert_forgotten(leasing)
        assert leasing.scheduler.metrics.num_extended < 50
        assert_still_works(leasing)


def test_a_client_that_does_not_read_is_dropped_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def tune(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)  # the system would hold a few MB back

    monkeypatch.setattr("specdecode.exchange.connection.tune", tune)
    with Leasing(Limits(max_unsent_bytes=1 << 15)) as leasing:
        ticket = leasing.admit()
        deaf, other = leasing.connect(ticket.key), drafter_over(leasing.connect())
        deaf._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        asks = [introducing(number, [1], k=20, temperature=1.0, ignore_eos=True) for number in range(20)]
        with suppress(ExchangeError):  # once it is dropped
            for round in range(8):
                deaf.send(encode_request(Request(round, 30.0, asks)))
        ticket.ended.result(30)
        assert len(other.propose([plain([1])])[0].tokens) == 4
        deaf.close()
        other.disconnect()
        assert_still_works(leasing)


def test_a_draft_model_that_raises_ends_the_sessions_and_not_the_draft(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    with Leasing() as leasing:
        tickets = [leasing.admit() for _ in range(3)]
        drafters = [drafter_over(leasing.connect(ticket.key)) for ticket in tickets[:2]]
        leasing.before_pass = fail
        assert [draft.tokens for draft in drafters[0].propose([plain([1])])] == [[]]
        assert drafters[0].metrics.num_fallbacks == {"gone": 1}
        for ticket in tickets[:2]:
            ticket.ended.result(10)
        assert [draft.tokens for draft in drafters[1].propose([plain([1])])] == [[]]
        assert "a pass of the draft model failed" in caplog.text
        leasing.before_pass = lambda: None
        assert not tickets[2].ended.done()  # a key that nobody has shown yet is as good as before
        later = drafter_over(leasing.connect(tickets[2].key))
        assert len(later.propose([plain([1])])[0].tokens) == 4
        later.disconnect()
        assert_still_works(leasing)


def test_drafts_that_no_frame_can_hold_end_the_session_and_not_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> bytes:
        raise struct.error("ushort format requires 0 <= number <= 65535")

    with Leasing() as leasing:
        drafter = drafter_over(leasing.connect())
        with monkeypatch.context() as patched:
            patched.setattr("specdecode.exchange.listener.encode_reply", fail)
            assert [draft.tokens for draft in drafter.propose([plain([1])])] == [[]]
        assert_still_works(leasing)


# Those who hold a key and say something wrong


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (encode(Kind.WELCOME), "expected a request, got a welcome"),
        (encode(Kind.HELLO, b"x" * 50), "expected a request, got a hello"),
        (encode(Kind.REQUEST, b"abc"), "a frame that ends after 3 bytes"),
        (b"SPDC\x02" + encode(Kind.REQUEST)[5:], "expected version 1 of the protocol, got 2"),
        (b"XXXX" + encode(Kind.REQUEST)[4:], "begins with b'SPDC'"),
        (b"SPDC\x01\x04" + b"\0" * 6 + struct.pack("<I", 5001), "at most 5000 bytes, got 5001"),
        (b"SPDC\x01\x04" + b"\0" * 6 + b"\xff" * 4, "at most 5000 bytes, got 4294967295"),
        (encode_request(Request(1, float("nan"), [])), "at least 0 seconds"),
        (encode_request(Request(1, 1.0, [introducing(1, [-1])])), "expected token ids"),
        (encode(Kind.REQUEST, struct.pack("<fI", 1.0, 2**32 - 1)), "a frame that ends after 8 bytes"),
    ],
    ids=range(10),
)
def test_a_session_ends_with_a_frame_that_is_none(said: bytes, message: str) -> None:
    with Leasing(Limits(max_frame_bytes=5000)) as leasing:
        ticket = leasing.admit()
        channel = leasing.connect(ticket.key)
        channel.send(said)
        frame = channel.receive(time.monotonic() + 10)
        assert frame.header.kind == Kind.REFUSAL
        assert message in frame.payload.decode()
        ticket.ended.result(10)
        channel.close()
        assert_still_works(leasing)


def test_a_target_whose_frames_are_refused_decodes_without_drafts() -> None:
    with Leasing(Limits(max_frame_bytes=1000)) as leasing:
        drafter = drafter_over(leasing.connect())
        [draft] = drafter.propose([plain([1] * 500)])
        assert draft.tokens == []
        assert set(drafter.metrics.num_fallbacks) <= {"refused", "gone"}  # what is closed with unread bytes may be reset
        assert_still_works(leasing)


def test_a_request_that_is_cut_off_waits_for_its_rest_and_ends_with_its_connection() -> None:
    frame = encode_request(Request(1, 30.0, [introducing(1, [1])]))
    with Leasing() as leasing:
        ticket = leasing.admit()
        channel = leasing.connect(ticket.key)
        for place in range(len(frame)):
            channel.send(frame[place : place + 1])
        reply = channel.receive(time.monotonic() + 10)
        assert len(decode_reply(1, reply.payload, VOCAB_SIZE).answers) == 1
        channel.send(frame[:-1])
        channel.close()
        ticket.ended.result(10)
        assert_still_works(leasing)


def test_a_target_that_does_not_fit_is_refused_with_the_reason() -> None:
    def drafter_for(_: object) -> ModelDrafter:
        raise ModelError("nothing in common")

    with Leasing() as leasing:
        leasing.scheduler._drafter_for = drafter_for
        ticket = leasing.admit()
        with pytest.raises(ExchangeError, match="nothing in common") as caught:
            leasing.connect(ticket.key)
        assert caught.value.cause == "refused"
        ticket.ended.result(10)


# Where it listens


def listening() -> Listener:
    return Listener(scheduler())


def test_it_listens_on_the_first_port_that_is_free() -> None:
    first, second = listening(), listening()
    try:
        while True:
            start = free_port()
            try:
                with socket.create_server((HOST, start)), socket.create_server((HOST, start + 1)):
                    assert first.listen(HOST, range(start, start + 5)) == (HOST, start + 2)
                    assert second.listen(HOST, range(start, start + 5)) == (HOST, start + 3)
                break
            except OSError:  # somebody else's
                continue
        assert first.listen(HOST, range(start, start + 5)) == (HOST, start + 2)  # once is enough
    finally:
        first.close()
        second.close()


def test_ports_that_are_all_in_use_are_an_error_that_names_them() -> None:
    listener = listening()
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"exchange.ports: expected a free one on 127.0.0.1, got range\({port}, {port + 1}"
        ):
            listener.listen(HOST, range(port, port + 1))
    assert listener.listen(HOST, range(port, port + 1)) == (HOST, port)
    listener.close()


@pytest.mark.parametrize("host", ["203.0.113.1", "no such host"])
def test_an_address_of_somebody_else_is_an_error_that_names_it(host: str) -> None:
    listener = listening()
    with pytest.raises(ConfigError, match=f"cannot listen on {host}"):
        listener.listen(host)
    assert listener.is_alive
    listener.close()


def test_two_who_ask_at_once_where_it_listens_get_one_answer() -> None:
    """As when two targets take a lease at the same time, and there is one port."""
    listener, port = listening(), free_port()
    addresses: list[object] = []

    def ask() -> None:
        addresses.append(listener.listen(HOST, range(port, port + 1)))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    gate = threading.Event()
    listener._loop.call_soon_threadsafe(gate.wait, 10)
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    gate.set()
    for thread in threads:
        thread.join()
    listener.close()
    assert addresses == [(HOST, port)] * 8


# The end


def test_closing_ends_everything() -> None:
    leasing = Leasing()
    with leasing:
        tickets = [leasing.admit() for _ in range(3)]
        drafters = [drafter_over(leasing.connect(ticket.key)) for ticket in tickets[:2]]
        strangers = [stranger(leasing) for _ in range(2)]
        assert len(drafters[0].propose([plain([1])])[0].tokens) == 4
        leasing.listener.close()
        assert not leasing.listener.is_alive
        assert leasing.listener.num_sessions == 0
        for ticket in tickets:
            assert ticket.ended.done()
        for drafter in drafters:
            assert [draft.tokens for draft in drafter.propose([plain([1])])] == [[]]
            assert drafter.metrics.num_fallbacks["gone"] == 1
        for connection in strangers:
            with connection, pytest.raises((ConnectionError, AssertionError)):
                assert connection.recv(1)
        with pytest.raises(ConnectionRefusedError):
            stranger(leasing)
        leasing.listener.close()  # once is enough, and more does no harm


def test_nothing_more_is_to_be_had_of_a_listener_that_is_closed() -> None:
    with Leasing() as leasing:
        leasing.listener.close()
        with pytest.raises(ExchangeError, match="the thread that drafts has ended") as caught:
            leasing.admit()
        assert caught.value.cause == "gone"
        with pytest.raises(ExchangeError, match="has ended"):
            call(leasing, "a", encode_request(Request(1, 1.0, [])))
        with pytest.raises(ExchangeError, match="has ended"):
            leasing.listener.listen("127.0.0.2")


def test_who_waits_for_an_answer_when_it_closes_does_not_wait_on() -> None:
    gate = Gate()
    with Leasing() as leasing:
        leasing.before_pass = gate
        ended = threading.Event()

        def wait() -> None:
            with pytest.raises((ExchangeError, asyncio.CancelledError)):
                call(leasing, "a", encode_request(Request(1, 60.0, [introducing(1, [1], k=90, ignore_eos=True)])))
            ended.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert gate.reached.wait(10)
        closing = threading.Thread(target=leasing.listener.close)
        closing.start()
        time.sleep(0.05)
        gate.resumed.set()
        assert ended.wait(10)
        thread.join()
        closing.join()


def test_a_thread_that_has_ended_is_noticed() -> None:
    """Without it nothing is drafted, and whoever looks after the draft replaces it."""
    listener = listening()
    assert listener.is_alive
    listener._loop.call_soon_threadsafe(listener._loop.stop)
    wait_until(lambda: not listener.is_alive)
    listener.close()


def test_many_come_and_go() -> None:
    with Leasing() as leasing:
        for number in range(30):
            drafter = drafter_over(leasing.connect())
            if number % 3:
                drafter.propose([plain([number % VOCAB_SIZE])])
            drafter.disconnect()
        wait_until(lambda: leasing.listener.num_sessions == 0)
        assert_forgotten(leasing)
        wait_until(lambda: not leasing.listener._connections)
