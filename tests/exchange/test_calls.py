"""Frames are answered without a connection too, for those who are trusted."""

import pytest

from specdecode.decoding.drafters import ModelDrafter
from specdecode.exchange.connection import Limits
from specdecode.exchange.frames import (
    HEADER_BYTES,
    Kind,
    encode,
    encode_request,
)
from specdecode.exchange.messages import ExchangeError, Request
from tests.exchange.conftest import Leasing
from tests.exchange.pairs import (
    DRAFT,
    TARGET,
    plain,
)
from tests.exchange.peers import call
from tests.exchange.test_scheduler import going_on, introducing, tokens_of

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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
