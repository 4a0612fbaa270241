"""A draft elsewhere guesses what it would guess here; where it does not answer as it should, it costs speed and no more."""

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch

from specdecode.decoding.drafters import ChainDrafter, ModelDrafter, NoDrafter, PromptLookupDrafter, RoutedDrafter
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.exchange.channel import Frame, InProcessChannel
from specdecode.exchange.frames import (
    HEADER_BYTES,
    Kind,
    decode_header,
    decode_reply,
    decode_request,
    encode,
    encode_reply,
    encode_request,
)
from specdecode.exchange.messages import Answer, Ask, ExchangeError, Reply, Request
from specdecode.exchange.remote import RemoteDrafter
from tests.exchange.conftest import Leasing
from tests.exchange.pairs import (
    COUPLED,
    DRAFT,
    GREEDY,
    SAMPLED,
    TARGET,
    TOKENS,
    VOCAB_SIZE,
    assert_same,
    connected,
    decode,
    plain,
    scheduler,
    varied,
)

EVERY = GREEDY + SAMPLED + COUPLED
HERE = ModelDrafter(DRAFT, eos_token_ids=TARGET.eos_token_ids)


# The draft that it would be here


@pytest.fixture(params=["in process", "tcp"])
def remote(request: pytest.FixtureRequest) -> Iterator[RemoteDrafter]:
    if request.param == "in process":
        yield connected(scheduler())[0]
        return
    leasing: Leasing = request.getfixturevalue("leasing")
    drafter = RemoteDrafter("test", VOCAB_SIZE, deadline_s=30.0)
    drafter.connect(leasing.connect())
    yield drafter
    drafter.disconnect()


def test_a_remote_draft_is_the_local_one(remote: RemoteDrafter) -> None:
    sequences = varied(EVERY, count=2)
    for sequence, k in zip(sequences, [0, 1, 4, 7] * 99, strict=False):
        sequence.k = k
    for _ in range(3):
        for one, other in zip(HERE.propose(sequences), remote.propose(sequences), strict=True):
            assert_same(one, other)
            assert not other.continues
        for sequence in sequences:
            sequence.tokens += [1, 3]
    assert not remote.metrics.num_fallbacks
    assert remote.metrics.num_rounds == 3


def test_decoding_with_a_remote_draft_equals_decoding_with_the_local_one(remote: RemoteDrafter) -> None:
    assert decode(varied(EVERY, count=2), remote) == decode(varied(EVERY, count=2), HERE)
    assert not remote.metrics.num_fallbacks


def test_a_seed_that_nobody_named_is_the_same_at_the_draft(remote: RemoteDrafter) -> None:
    sequence = Sequence([1], SamplingParams(temperature=1.0), Route("draft", 6))
    [one], [other] = HERE.propose([sequence]), remote.propose([sequence])
    assert_same(one, other)


def test_prompt_and_output_are_told_apart_where_a_generation_is_taken_up_again(remote: RemoteDrafter) -> None:
    """Penalties count the output alone, and `max_tokens` what is left of it."""
    params = SamplingParams(temperature=1.0, frequency_penalty=2.0, presence_penalty=1.0, min_tokens=6, max_tokens=9)
    sequence = Sequence([1, 2, 2, 2, 3, 2], params, Route("draft", 9), num_prompt_tokens=2)
    [one], [other] = HERE.propose([sequence]), remote.propose([sequence])
    assert len(other.tokens) <= 4
    assert_same(one, other)


def test_only_what_is_new_is_said() -> None:
    sizes: list[int] = []

    def measure(frame: bytes) -> list[bytes]:
        sizes.append(len(frame))
        return [frame]

    remote, _ = connected(scheduler(), measure)
    sequence = plain([number % VOCAB_SIZE for number in range(2000)], max_tokens=40)
    decode([sequence], remote)
    requests = sizes[::2]
    assert requests[0] > 8000
    assert max(requests[1:]) < 100


def test_a_longer_draft_than_a_frame_can_ask_for_is_asked_for_as_far_as_it_goes() -> None:
    asked: list[int] = []

    def look(frame: bytes) -> list[bytes]:
        if decode_header(frame[:HEADER_BYTES]).kind == Kind.REQUEST:
            asked.extend(ask.k for ask in decode_request(1, frame[HEADER_BYTES:]).asks)
        return []

    connected(scheduler(), look)[0].propose([plain([1], k=1 << 20, max_tokens=1 << 20)])
    assert asked == [0xFFFF]


# What goes wrong


class Scripted:
    """A channel on which what arrives is written beforehand: frames, or what is raised."""

    def __init__(self, script: Callable[[Request], list[bytes]]) -> None:
        self._script = script
        self._arrived: list[bytes] = []
        self.num_requests = 0
        self.num_closed = 0

    def send(self, frame: bytes) -> None:
        self.num_requests += 1
        header = decode_header(frame[:HEADER_BYTES])
        self._arrived += self._script(decode_request(header.round, frame[HEADER_BYTES:]))

    def receive(self, deadline: float) -> Frame:  # noqa: ARG002  nothing comes later
        if not self._arrived:
            raise ExchangeError("late", "no answer in time")
        frame = self._arrived.pop(0)
        return Frame(decode_header(frame[:HEADER_BYTES]), frame[HEADER_BYTES:])

    def close(self) -> None:
        self.num_closed += 1


def answers_of(tokens: list[int], request: Request, **changes: object) -> Reply:
    reply = Reply(request.round, 0.0, [Answer(Draft.certain(tokens) if tokens else Draft.empty()) for _ in request.asks])
    return replace(reply, **changes)  # type: ignore[arg-type]


def raising(cause: str) -> Callable[[Request], list[bytes]]:
    def script(_: Request) -> list[bytes]:
        raise ExchangeError(cause, "on purpose")

    return script


def with_a_wrong_q(request: Request) -> list[bytes]:
    draft = Draft([1, 2], torch.tensor([[1, 2], [2, 1]]), torch.tensor([[0.5, 0.2], [0.5, 0.5]]))
    return [encode_reply(answers_of([], request, answers=[Answer(draft) for _ in request.asks]))]


FAILURES: dict[str, tuple[str, Callable[[Request], list[bytes]]]] = {
    "nothing comes": ("late", lambda _: []),
    "the way is gone": ("gone", raising("gone")),
    "it is refused": ("refused", lambda _: [encode(Kind.REFUSAL, "no, naïve one".encode())]),
    "a refusal that is no text": ("refused", lambda _: [encode(Kind.REFUSAL, b"\xff\xfe")]),
    "another version": ("refused", lambda _: [b"SPDC\x63" + encode(Kind.REPLY)[5:]]),
    "another protocol": ("garbled", lambda _: [b"HTTP/1.1 400 Bad Request\r\n\r\n"]),
    "a frame of another kind": ("garbled", lambda r: [encode(Kind.WELCOME, b"", r.round)]),
    "a request": ("garbled", lambda r: [encode_request(r)]),
    "a reply from the future": ("garbled", lambda r: [encode_reply(answers_of([1], r, round=r.round + 1))]),
    "a reply of nothing": ("garbled", lambda r: [encode(Kind.REPLY, b"", r.round)]),
    "random bytes": ("garbled", lambda r: [encode(Kind.REPLY, random.Random(0).randbytes(100), r.round)]),
    "too few answers": ("garbled", lambda r: [encode_reply(answers_of([1], r, answers=[]))]),
    "too many answers": ("garbled", lambda r: [encode_reply(answers_of([1], r, answers=[Answer(None)] * 9))]),
    "more tokens than were asked for": ("garbled", lambda r: [encode_reply(answers_of([1] * 5, r))]),
    "an id beyond the vocabulary": ("garbled", lambda r: [encode_reply(answers_of([VOCAB_SIZE], r))]),
    "a q that is none": ("garbled", with_a_wrong_q),
    "unknown for ever, then silence": (
        "late",
        lambda r: [encode_reply(answers_of([], r, answers=[Answer(None) for _ in r.asks]))] if r.round == 1 else [],
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_draft_that_fails_is_no_draft(name: str) -> None:
    cause, script = FAILURES[name]
    drafter, channel = RemoteDrafter("test", VOCAB_SIZE, deadline_s=5.0), Scripted(script)
    lost = drafter.connect(channel)
    sequences = [plain([1, 2]), plain([3])]
    assert drafter.is_connected and not lost.done()
    assert [draft.tokens for draft in drafter.propose(sequences)] == [[], []]
    assert drafter.metrics.num_fallbacks == {cause: 2}
    assert drafter.metrics.num_rounds == 0
    assert not drafter.is_connected
    assert channel.num_closed == 1
    assert lost.done() and lost.result().cause == cause
    num_requests = channel.num_requests
    for _ in range(3):  # nothing is asked until somebody connects again
        assert [draft.tokens for draft in drafter.propose(sequences)] == [[], []]
    assert channel.num_requests == num_requests
    assert drafter.metrics.num_fallbacks == {cause: 2, "absent": 6}


@pytest.mark.parametrize("name", FAILURES)
def test_a_draft_that_fails_costs_no_answer(name: str) -> None:
    drafter = RemoteDrafter("test", VOCAB_SIZE, deadline_s=5.0)
    drafter.connect(Scripted(FAILURES[name][1]))
    assert decode(varied(GREEDY), drafter) == decode(varied(GREEDY), NoDrafter())


def test_a_draft_that_nobody_connected_is_absent() -> None:
    drafter = RemoteDrafter("test", VOCAB_SIZE, deadline_s=5.0)
    assert not drafter.is_connected
    assert [draft.tokens for draft in drafter.propose([plain([1])])] == [[]]
    assert drafter.metrics.num_fallbacks == {"absent": 1}
    drafter.disconnect()


def test_after_connecting_again_everything_is_told_whole() -> None:
    told: list[Request] = []
    schedule, sequences = scheduler(), varied(EVERY)

    def look(frame: bytes) -> list[bytes]:
        header = decode_header(frame[:HEADER_BYTES])
        if header.kind == Kind.REQUEST:
            told.append(decode_request(header.round, frame[HEADER_BYTES:]))
        return [frame]

    drafter, _ = connected(schedule, look)
    drafter.propose(sequences)
    drafter.propose(sequences)
    drafter.connect(InProcessChannel(schedule, TOKENS, look))
    for one, other in zip(HERE.propose(sequences), drafter.propose(sequences), strict=True):
        assert_same(one, other)
    assert [[ask.introduction is not None for ask in request.asks] for request in told] == [
        [True] * len(sequences),
        [False] * len(sequences),
        [True] * len(sequences),
    ]
    assert [request.round for request in told] == [1, 2, 1]
    assert [ask.added.tolist() for ask in told[2].asks] == [sequence.tokens for sequence in sequences]
    assert drafter.metrics.num_told_again == 0


def test_another_connection_takes_the_place_of_the_one_before() -> None:
    schedule = scheduler()
    drafter, _ = connected(schedule)
    lost = drafter.connect(InProcessChannel(schedule, TOKENS))
    newer = drafter.connect(InProcessChannel(schedule, TOKENS))
    assert lost.result(0).cause == "gone"
    assert not newer.done()
    assert schedule.num_sessions == 1
    drafter.disconnect()
    drafter.disconnect()
    assert newer.result(0).cause == "gone"
    assert schedule.num_sessions == 0


def test_a_failure_of_a_connection_that_was_replaced_leaves_the_new_one_alone() -> None:
    drafter = RemoteDrafter("test", VOCAB_SIZE, deadline_s=5.0)
    drafter.connect(Scripted(lambda _: []))
    finish = drafter.start([plain([1])])
    lost = drafter.connect(Scripted(lambda r: [encode_reply(answers_of([1], r))]))
    assert [draft.tokens for draft in finish()] == [[]]
    assert drafter.is_connected and not lost.done()
    assert [draft.tokens for draft in drafter.propose([plain([1])])] == [[1]]


def test_replies_of_earlier_rounds_are_passed_over() -> None:
    def script(request: Request) -> list[bytes]:
        stale = [encode_reply(answers_of([6, 6], request, round=round)) for round in range(request.round)]
        return [*stale, encode_reply(answers_of([request.round], request)), *stale]

    drafter = RemoteDrafter("test", VOCAB_SIZE, deadline_s=5.0)
    drafter.connect(Scripted(script))
    assert [drafter.propose([plain([1])])[0].tokens for _ in range(5)] == [[1], [2], [3], [4], [5]]
    assert not drafter.metrics.num_fallbacks


def test_what_is_forgotten_over_and_over_gets_an_empty_draft_and_no_third_request() -> None:
    drafter = RemoteDrafter("test", VOCAB_SIZE, deadline_s=5.0)
    channel = Scripted(lambda r: [encode_reply(answers_of([], r, answers=[Answer(None) for _ in r.asks]))])
    drafter.connect(channel)
    assert [draft.tokens for draft in drafter.propose([plain([1]), plain([2])])] == [[], []]
    assert (channel.num_requests, drafter.metrics.num_told_again) == (2, 2)
    assert drafter.is_connected


def test_a_sequence_that_has_ended_is_not_remembered() -> None:
    drafter, _ = connected(scheduler())
    sequence = plain([1])
    drafter.propose([sequence])
    gone = weakref.ref(sequence)
    del sequence
    gc.collect()
    assert gone() is None


def test_a_draft_that_is_too_slow_for_its_deadline_is_late(leasing: Leasing) -> None:
    """Over a connection: the draft answers with what it has well before that, unless a single pass takes longer."""
    blocked = threading.Event()
    leasing.before_pass = lambda: blocked.wait(5) and None
    drafter = RemoteDrafter("test", VOCAB_SIZE, deadline_s=0.2)
    lost = drafter.connect(leasing.connect())
    started = time.monotonic()
    assert [draft.tokens for draft in drafter.propose([plain([1])])] == [[]]
    assert 0.15 < time.monotonic() - started < 2
    assert drafter.metrics.num_fallbacks == {"late": 1}
    assert lost.result(0).cause == "late"
    blocked.set()


def test_whoever_gives_a_channel_up_wakes_the_thread_that_waits_on_it(leasing: Leasing) -> None:
    blocked = threading.Event()
    leasing.before_pass = lambda: blocked.wait(20) and None
    drafter = RemoteDrafter("test", VOCAB_SIZE, deadline_s=20.0)
    drafter.connect(leasing.connect())
    drafts: Future[list[Draft]] = Future()
    thread = threading.Thread(target=lambda: drafts.set_result(drafter.propose([plain([1])])))
    thread.start()
    time.sleep(0.2)
    started = time.monotonic()
    drafter.disconnect()
    assert [draft.tokens for draft in drafts.result(10)] == [[]]
    assert time.monotonic() - started < 5
    blocked.set()
    thread.join()
    assert drafter.metrics.num_fallbacks == {"gone": 1}


def test_a_large_request_is_sent_even_after_an_answer_that_came_at_the_last_moment(leasing: Leasing) -> None:
    """The time that is left to wait for an answer is not the time that the next request may take."""
    channel = leasing.connect()
    channel.send(encode_request(Request(1, 1.0, [])))
    time.sleep(0.3)
    assert channel.receive(time.monotonic()).header.kind == Kind.REPLY
    large = Ask(1, 5, 0, np.zeros(3_000_000, dtype=np.int32), 1)
    channel.send(encode_request(Request(2, 30.0, [large])))
    frame = channel.receive(time.monotonic() + 30)
    assert decode_reply(2, frame.payload, VOCAB_SIZE).answers == [Answer(None)]
    channel.close()


# In the company of others


class Logged:
    """A drafter elsewhere that notes when it is started and when it is waited for."""

    def __init__(self, name: str, log: list[str], tokens: list[int]) -> None:
        self._name, self._log, self._tokens = name, log, tokens

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        return self.start(sequences)()

    def start(self, sequences: list[Sequence]) -> Callable[[], list[Draft]]:
        self._log.append(f"start {self._name}")

        def finish() -> list[Draft]:
            self._log.append(f"wait {self._name}")
            return [Draft.certain(self._tokens) for _ in sequences]

        return finish


class Here:
    """A drafter in this process, which works when it is waited for."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        self._log.append("here")
        return [Draft.certain([3]) for _ in sequences]


def test_all_distant_drafters_are_started_before_any_is_waited_for() -> None:
    log: list[str] = []
    routed = RoutedDrafter(
        {
            "here": Here(log),
            "a": Logged("a", log, [1]),
            "b": ChainDrafter([PromptLookupDrafter(), Logged("b", log, [2])]),
            "unused": Logged("c", log, [4]),
        }
    )
    sequences = [Sequence([5], SamplingParams(), Route(name, 2)) for name in ("b", "here", "a", "b")]
    assert [draft.tokens for draft in routed.propose(sequences)] == [[2], [3], [1], [2]]
    assert log[:2] == ["start a", "start b"]
    assert sorted(log[2:]) == ["here", "wait a", "wait b"]


def test_two_remote_drafts_work_at_the_same_time_over_connections(leasing: Leasing) -> None:
    with Leasing() as other:
        drafters = {}
        both = threading.Barrier(2, timeout=10)
        for name, one in (("a", leasing), ("b", other)):
            one.before_pass = lambda: both.wait() and None
            drafters[name] = RemoteDrafter(name, VOCAB_SIZE, deadline_s=20.0)
            drafters[name].connect(one.connect())
        sequences = [Sequence([5], SamplingParams(), Route(name, 1)) for name in ("a", "b")]
        assert [len(draft.tokens) for draft in RoutedDrafter(drafters).propose(sequences)] == [1, 1]
        for drafter in drafters.values():
            assert not drafter.metrics.num_fallbacks
            drafter.disconnect()


def test_a_draft_that_fails_leaves_the_others_their_drafts() -> None:
    broken, working = RemoteDrafter("broken", VOCAB_SIZE, deadline_s=5.0), connected(scheduler())[0]
    broken.connect(Scripted(raising("gone")))
    routed = RoutedDrafter({"broken": broken, "draft": working})
    sequences = [plain([1]), Sequence([2], SamplingParams(), Route("broken", 3)), plain([3])]
    here = HERE.propose(sequences)
    assert [draft.tokens for draft in routed.propose(sequences)] == [here[0].tokens, [], here[2].tokens]


def test_the_draft_is_asked_only_for_what_a_lookup_does_not_find() -> None:
    remote, channel = connected(scheduler())
    chain = ChainDrafter([PromptLookupDrafter(), remote])
    sequences = [plain([1, 2, 3, 1, 2]), plain([4, 1, 0])]
    found, drafted = chain.propose(sequences)
    assert found.tokens == [3, 1, 2, 3]
    assert_same(HERE.propose(sequences)[1], drafted)
    assert channel.scheduler.num_sequences == 1


def test_a_time_for_each_round_is_told() -> None:
    drafter, channel = connected(scheduler())
    drafter.propose([plain([1])])
    assert 0 < drafter.metrics.last_busy_s < 5
    assert 0 <= drafter.metrics.last_exchange_s < 5
    assert drafter.metrics.last_busy_s == pytest.approx(channel.scheduler.metrics.busy_s, rel=1e-3)
