"""Drafts over TLS are the same, and nobody is believed whom the authority does not vouch for."""

import datetime
import ipaddress
import ssl
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from specdecode.exchange.channel import TcpChannel
from specdecode.exchange.messages import ExchangeError
from tests.exchange.conftest import HOST, Leasing, wait_until
from tests.exchange.pairs import (
    TOKENS,
    connected,
    decode,
    scheduler,
    varied,
)
from tests.exchange.peers import EVERY, IMPATIENT, answer_to, assert_forgotten, assert_still_works, drafter_over, stranger

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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
