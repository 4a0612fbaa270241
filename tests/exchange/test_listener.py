"""Who holds a key is served; whoever else comes, and whatever they do, is refused soon and leaves nothing behind."""

import asyncio
import datetime
import ipaddress
import random
import socket
import ssl
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from specdecode.decoding.drafters import ModelDrafter
from specdecode.errors import ConfigError, ModelError
from specdecode.exchange.channel import TcpChannel
from specdecode.exchange.frames import (
    HEADER_BYTES,
    KEY_BYTES,
    MAX_FRAME_BYTES,
    Kind,
    decode_header,
    decode_reply,
    encode,
    encode_hello,
    encode_request,
)
from specdecode.exchange.listener import Limits, Listener
from specdecode.exchange.messages import Answer, ExchangeError, Request
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
    connected,
    decode,
    plain,
    scheduler,
    varied,
)
from tests.exchange.test_scheduler import going_on, introducing, tokens_of

pytestmark = pytest.mark.usefixtures("nothing_is_left")

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
    reached, resumed = threading.Event(), threading.Event()

    def block() -> None:
        reached.set()
        resumed.wait(10)

    with Leasing() as leasing:
        leasing.before_pass = block
        ticket = leasing.admit()
        channel = leasing.connect(ticket.key)
        channel.send(encode_request(Request(1, 30.0, [introducing(1, [1], k=50, ignore_eos=True)])))
        assert reached.wait(10)
        channel.close()
        resumed.set()
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


# Those who do not


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


def free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


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


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two self-signed certificates, each with its key in the same file."""
    return {name: self_signed(tmp_path_factory.mktemp("tls") / f"{name}.pem") for name in ("ours", "other")}


def self_signed(path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "draft")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + secret)
    return path


def shown(path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


def trusting(path: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(path))


def test_drafts_over_tls_are_the_same(certificates: dict[str, Path]) -> None:
    expected = decode(varied(EVERY), connected(scheduler())[0])
    with Leasing(tls=shown(certificates["ours"])) as leasing:
        ticket = leasing.admit()
        drafter = drafter_over(TcpChannel.connect(leasing.address, ticket.key, TOKENS, 10.0, trusting(certificates["ours"])))
        assert decode(varied(EVERY), drafter) == expected
        assert not drafter.metrics.num_fallbacks
        drafter.disconnect()
        ticket.ended.result(10)
        assert_forgotten(leasing)


def test_a_connection_over_tls_that_is_open_at_the_end_is_closed(certificates: dict[str, Path]) -> None:
    with Leasing(tls=shown(certificates["ours"])) as leasing:
        channel = TcpChannel.connect(leasing.address, leasing.admit().key, TOKENS, 10.0, trusting(certificates["ours"]))
        half_open = stranger(leasing)
        leasing.listener.close()
        with pytest.raises(ExchangeError) as caught:
            channel.receive(time.monotonic() + 10)
        assert caught.value.cause == "gone"
        channel.close()
        half_open.close()


def test_a_draft_that_another_authority_vouches_for_is_not_believed(certificates: dict[str, Path]) -> None:
    with Leasing(IMPATIENT, tls=shown(certificates["other"])) as leasing:
        ticket = leasing.admit()
        with pytest.raises(ExchangeError, match="certificate verify failed") as caught:
            TcpChannel.connect(leasing.address, ticket.key, TOKENS, 10.0, trusting(certificates["ours"]))
        assert caught.value.cause == "gone"
        ticket.ended.result(10)  # the key was not shown to whoever it was
        assert leasing.scheduler.num_sessions == 0


def test_a_target_without_tls_is_refused_in_time_where_the_draft_wants_it(certificates: dict[str, Path]) -> None:
    with Leasing(IMPATIENT, tls=shown(certificates["ours"])) as leasing:
        started = time.monotonic()
        with pytest.raises(ExchangeError) as caught:
            leasing.connect(timeout_s=10.0)
        assert caught.value.cause in {"gone", "garbled"}  # closed, or what TLS has to say about it
        with stranger(leasing) as silent:
            assert answer_to(silent) == b""
        assert time.monotonic() - started < 8
        wait_until(lambda: leasing.listener.num_sessions == 0)


def test_a_target_with_tls_is_refused_in_time_where_the_draft_has_none(certificates: dict[str, Path]) -> None:
    with Leasing(IMPATIENT) as leasing:
        with pytest.raises(ExchangeError) as caught:
            TcpChannel.connect(leasing.address, leasing.admit().key, TOKENS, 10.0, trusting(certificates["ours"]))
        assert caught.value.cause == "gone"
        assert_still_works(leasing)


# Those who connect


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


# Frames without a connection


def call(leasing: Leasing, caller: str, frame: bytes) -> list[Answer]:
    reply = asyncio.run(leasing.listener.call(caller, TOKENS, frame))
    header = decode_header(reply[:HEADER_BYTES])
    assert header.kind == Kind.REPLY
    return decode_reply(header.round, reply[HEADER_BYTES:], VOCAB_SIZE).answers


def test_frames_are_answered_without_a_connection() -> None:
    here = ModelDrafter(DRAFT, eos_token_ids=TARGET.eos_token_ids)
    expected = [draft.tokens for draft in here.propose([plain([1, 2], k=3), plain([1, 2, 5], k=3)])]
    with Leasing() as leasing:
        whole = introducing(1, [1, 2], ignore_eos=True)
        assert tokens_of(call(leasing, "a", encode_request(Request(1, 30.0, [whole])))) == expected[:1]
        more = going_on(1, [1, 2], [5])
        assert tokens_of(call(leasing, "a", encode_request(Request(2, 30.0, [more])))) == expected[1:]
        assert tokens_of(call(leasing, "b", encode_request(Request(1, 30.0, [more])))) == [None]  # it told nothing
        assert leasing.scheduler.num_sessions == 2


def test_callers_are_bounded_and_the_one_that_was_silent_longest_is_forgotten() -> None:
    with Leasing(Limits(max_sessions=3)) as leasing:
        told = encode_request(Request(1, 30.0, [introducing(1, [1, 2], ignore_eos=True)]))
        more = encode_request(Request(2, 30.0, [going_on(1, [1, 2], [5])]))
        for caller in ("a", "b", "c"):
            call(leasing, caller, told)
        assert tokens_of(call(leasing, "a", more)) != [None]
        call(leasing, "d", told)
        assert leasing.scheduler.num_sessions == 3
        assert tokens_of(call(leasing, "b", more)) == [None]
        assert tokens_of(call(leasing, "a", more)) != [None]
        assert leasing.scheduler.num_sessions == 3


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"SPDC",
        b"x" * 100,
        encode(Kind.REQUEST),
        encode(Kind.HELLO, b"x" * 50),
        encode_request(Request(1, 1.0, []))[:-1],
        encode_request(Request(1, 1.0, [])) + b"x",
        encode_request(Request(1, float("nan"), [])),
        encode_request(Request(1, 1.0, [introducing(1, [-5])])),
        encode(Kind.REQUEST, bytes(2000)),
        encode(Kind.REPLY, encode_request(Request(1, 1.0, []))[HEADER_BYTES:]),
        encode(Kind.REQUEST) + encode_request(Request(1, 1.0, [introducing(1, [1] * 1000)]))[HEADER_BYTES:],
        b"SPDC\x01\x04" + b"\0" * 6 + b"\xff" * 4,
    ],
    ids=range(13),
)
def test_a_call_of_garbage_is_refused_and_leaves_nothing(frame: bytes) -> None:
    with Leasing(Limits(max_frame_bytes=1000)) as leasing:
        with pytest.raises(ExchangeError) as caught:
            call(leasing, "a", frame)
        assert caught.value.cause in {"garbled", "refused"}
        assert (leasing.scheduler.num_sessions, leasing.scheduler.num_pending) == (0, 0)
        assert leasing.listener.is_alive


def test_a_call_that_is_not_answered_in_time_is_late_and_the_next_one_is_answered() -> None:
    with Leasing() as leasing:
        with pytest.raises(ExchangeError) as caught:
            call(leasing, "a", encode_request(Request(1, 0.0, [introducing(1, [1])])))
        assert caught.value.cause == "late"
        answers = call(leasing, "a", encode_request(Request(2, 30.0, [introducing(1, [1], k=3, ignore_eos=True)])))
        assert [len(tokens or []) for tokens in tokens_of(answers)] == [3]


def test_a_caller_is_served_again_after_a_pass_that_failed() -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    with Leasing(run_ahead=True) as leasing:
        leasing.before_pass = fail
        with pytest.raises(ExchangeError):
            call(leasing, "a", encode_request(Request(1, 0.3, [introducing(1, [1])])))
        leasing.before_pass = lambda: None
        whole = introducing(1, [1], ignore_eos=True)
        assert tokens_of(call(leasing, "a", encode_request(Request(2, 30.0, [whole])))) != [None]
        assert leasing.scheduler.num_sessions == 1


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
    reached, resumed = threading.Event(), threading.Event()

    def block() -> None:
        reached.set()
        resumed.wait(10)

    with Leasing() as leasing:
        leasing.before_pass = block
        ended = threading.Event()

        def wait() -> None:
            with pytest.raises((ExchangeError, asyncio.CancelledError)):
                call(leasing, "a", encode_request(Request(1, 60.0, [introducing(1, [1], k=90, ignore_eos=True)])))
            ended.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert reached.wait(10)
        closing = threading.Thread(target=leasing.listener.close)
        closing.start()
        time.sleep(0.05)
        resumed.set()
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
