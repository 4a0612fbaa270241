"""What is said is understood, bit for bit; what is not as it should be is refused in words, whatever it is."""

import json
import pickle
import random
import struct
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from specdecode.decoding.sequence import Draft, SamplingParams
from specdecode.exchange.frames import (
    HEADER_BYTES,
    KEY_BYTES,
    MAX_FRAME_BYTES,
    VERSION,
    Kind,
    decode_header,
    decode_hello,
    decode_reply,
    decode_request,
    encode,
    encode_hello,
    encode_reply,
    encode_request,
)
from specdecode.exchange.messages import Answer, Ask, ExchangeError, Introduction, ModelTokens, Reply, Request, checksum
from tests.exchange.pairs import COUPLED, GREEDY, SAMPLED, TOKENS, assert_same, scheduler

CAUSES = {"garbled", "refused"}


def random_draft(rng: random.Random, vocab_size: int, dtype: torch.dtype | None = None) -> Draft:
    k = rng.randint(0, 6)
    if k == 0:
        return Draft.empty()
    tokens = [rng.randrange(vocab_size) for _ in range(k)]
    continues = rng.random() < 0.5
    if rng.random() < 0.3 and dtype is None:
        return replace(Draft.certain(tokens), continues=continues)
    width = rng.randint(2, 9)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    q = torch.rand(k, width, generator=generator, dtype=dtype or torch.float32)
    support = torch.stack([torch.randperm(vocab_size, generator=generator)[:width] for _ in range(k)])
    return Draft(tokens, support, q / q.sum(-1, keepdim=True), continues)


def random_reply(seed: int) -> Reply:
    rng = random.Random(seed)
    drafts = [random_draft(rng, 5000) if rng.random() < 0.8 else None for _ in range(rng.randint(0, 9))]
    answers = [Answer(draft, rng.randint(0, len(draft.tokens)) if draft else 0) for draft in drafts]
    return Reply(rng.randrange(2**32), struct.unpack("<f", struct.pack("<f", rng.random()))[0], answers)


def random_params(rng: random.Random) -> SamplingParams:
    ids = lambda: frozenset(rng.randrange(200_000) for _ in range(rng.randint(1, 5)))  # noqa: E731  drawn anew each time
    every = {
        "temperature": rng.uniform(0, 2),
        "top_p": rng.uniform(0.1, 1),
        "top_k": rng.randint(1, 500),
        "min_p": rng.random(),
        "repetition_penalty": rng.uniform(0.5, 2),
        "presence_penalty": rng.uniform(-2, 2),
        "frequency_penalty": rng.uniform(-2, 2),
        "logit_bias": {token: rng.uniform(-100, 100) for token in ids()},
        "allowed_token_ids": ids(),
        "bad_words_ids": tuple(tuple(ids()) for _ in range(3)),
        "min_tokens": rng.randint(0, 9),
        "max_tokens": rng.randint(10, 5000),
        "stop_token_ids": ids(),
        "ignore_eos": True,
        "seed": rng.randrange(2**64),
        "verifier": rng.choice(["block", "coupled"]),
    }
    return SamplingParams(**{name: value for name, value in every.items() if rng.random() < 0.6})


def random_request(seed: int) -> Request:
    rng = random.Random(seed)
    asks = []
    for _ in range(rng.randint(0, 9)):
        added = np.array([rng.randrange(2**31) for _ in range(rng.randint(0, 30))], dtype=np.int32)
        about = Introduction(f"naïve-{rng.random()}", rng.randint(1, 40), random_params(rng), rng.randrange(2**64))
        is_new = rng.random() < 0.5
        ask = Ask(rng.randrange(2**32), rng.randrange(2**32), rng.randrange(2**32), added, rng.randrange(2**16))
        asks.append(replace(ask, introduction=about) if is_new else ask)
    return Request(rng.randrange(2**32), struct.unpack("<f", struct.pack("<f", rng.random()))[0], asks)


def parts(frame: bytes) -> tuple[int, bytes]:
    header = decode_header(frame[:HEADER_BYTES])
    assert header.num_bytes == len(frame) - HEADER_BYTES
    return header.round, frame[HEADER_BYTES:]


def decode_any(frame: bytes) -> object:
    """Reads a frame of any kind, as whoever receives it does."""
    header, payload = decode_header(frame[:HEADER_BYTES]), frame[HEADER_BYTES:]
    if header.kind == Kind.HELLO:
        return decode_hello(payload)
    if header.kind == Kind.REQUEST:
        return decode_request(header.round, payload)
    return decode_reply(header.round, payload, 5000) if header.kind == Kind.REPLY else None


def refused(frame: bytes) -> ExchangeError:
    with pytest.raises(ExchangeError) as caught:
        decode_any(frame)
    assert caught.value.cause in CAUSES
    assert str(caught.value) and "\n" not in str(caught.value)
    return caught.value


# What is said is understood


@pytest.mark.parametrize("seed", range(60))
def test_a_request_arrives_as_it_was_sent(seed: int) -> None:
    sent = random_request(seed)
    arrived = decode_request(*parts(encode_request(sent)))
    assert (arrived.round, arrived.patience_s, len(arrived.asks)) == (sent.round, sent.patience_s, len(sent.asks))
    for one, other in zip(sent.asks, arrived.asks, strict=True):
        assert (one.number, one.num_known, one.checksum, one.k) == (other.number, other.num_known, other.checksum, other.k)
        assert one.added.tolist() == other.added.tolist()
        assert one.introduction == other.introduction


@pytest.mark.parametrize("seed", range(60))
def test_a_reply_arrives_as_it_was_sent(seed: int) -> None:
    sent = random_reply(seed)
    arrived = decode_reply(*parts(encode_reply(sent)), 5000)
    assert (arrived.round, arrived.busy_s, len(arrived.answers)) == (sent.round, sent.busy_s, len(sent.answers))
    for one, other in zip(sent.answers, arrived.answers, strict=True):
        assert (one.draft is None) == (other.draft is None)
        if one.draft is not None and other.draft is not None:
            assert (one.draft.tokens, one.num_ahead) == (other.draft.tokens, other.num_ahead)
            assert one.draft.continues == other.draft.continues
            width = one.draft.q.shape[1]  # rows may be filled up to the widest, with probabilities of 0
            assert torch.equal(other.draft.q[:, :width], one.draft.q) and other.draft.q[:, width:].eq(0).all()
            assert torch.equal(other.draft.support[:, :width], one.draft.support)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_q_arrives_bit_for_bit(dtype: torch.dtype) -> None:
    for seed in range(30):
        draft = random_draft(random.Random(seed), 50, dtype)
        (answer,) = decode_reply(*parts(encode_reply(Reply(1, 0.0, [Answer(draft)]))), 50).answers
        assert answer.draft is not None
        assert_same(draft, answer.draft)
        assert answer.draft.q.dtype == draft.q.dtype


def test_a_certain_draft_says_no_q() -> None:
    tokens = list(range(100))
    certain = encode_reply(Reply(1, 0.0, [Answer(Draft.certain(tokens))]))
    assert len(certain) < HEADER_BYTES + 4 * len(tokens) + 64
    (answer,) = decode_reply(*parts(certain), 100).answers
    assert answer.draft is not None
    assert_same(Draft.certain(tokens), answer.draft)


def test_every_sampling_parameter_that_matters_to_a_draft_survives_an_introduction() -> None:
    for kind in GREEDY + SAMPLED + COUPLED:
        params = SamplingParams(**{"max_tokens": 33, "seed": 2**64 - 1, **kind})
        ask = Ask(1, 0, 0, np.array([1, 2], dtype=np.int32), 3, Introduction("a", 2, params, 5))
        (arrived,) = decode_request(*parts(encode_request(Request(1, 1.0, [ask])))).asks
        assert arrived.introduction == ask.introduction


def test_what_a_draft_has_no_use_for_is_not_said() -> None:
    introduction = Introduction("a", 1, SamplingParams(logprobs=5, prompt_logprobs=3), 0)
    ask = Ask(1, 0, 0, np.array([1], dtype=np.int32), 3, introduction)
    (arrived,) = decode_request(*parts(encode_request(Request(1, 1.0, [ask])))).asks
    assert arrived.introduction == replace(introduction, params=SamplingParams())


def test_a_hello_arrives_as_it_was_sent() -> None:
    target = ModelTokens("models/ä", "digest", 151_936, frozenset({7, 151_645}))
    _, payload = parts(encode_hello(bytes(range(KEY_BYTES)), target))
    assert payload[:KEY_BYTES] == bytes(range(KEY_BYTES))
    assert decode_hello(payload) == target


def test_a_checksum_goes_on_from_that_of_the_beginning() -> None:
    tokens = np.array([5, 3, 2**31 - 1, 0, 9], dtype=np.int32)
    for place in range(6):
        assert checksum(tokens[place:], checksum(tokens[:place])) == checksum(tokens)
    assert checksum(tokens) != checksum(tokens[::-1].copy())


def test_an_error_says_its_cause_in_another_process_too() -> None:
    error = pickle.loads(pickle.dumps(ExchangeError("refused", "no more sessions")))
    assert (error.cause, str(error)) == ("refused", "no more sessions")


# What is not as it should be is refused


def frames() -> list[bytes]:
    """One of each kind that says something, with all that there is to say."""
    reply = Reply(7, 0.5, [Answer(random_draft(random.Random(n), 5000, torch.float64 if n % 2 else None), 0) for n in range(4)])
    return [
        encode_hello(b"k" * KEY_BYTES, TOKENS),
        encode_request(next(r for r in map(random_request, range(99)) if sum(bool(a.introduction) for a in r.asks) > 2)),
        encode_reply(replace(reply, answers=[*reply.answers, Answer(None)])),
    ]


@pytest.mark.parametrize("frame", frames(), ids=["hello", "request", "reply"])
def test_a_frame_that_is_cut_off_is_refused_wherever_it_is_cut(frame: bytes) -> None:
    for length in range(len(frame)):
        refused(frame[:length])


@pytest.mark.parametrize("frame", frames(), ids=["hello", "request", "reply"])
@pytest.mark.parametrize("surplus", [b"\0", b"x" * 7, b"\0" * 1000])
def test_a_frame_that_goes_on_after_its_end_is_refused(frame: bytes, surplus: bytes) -> None:
    refused(frame + surplus)


def with_header(frame: bytes, place: int, data: bytes) -> bytes:
    return frame[:place] + data + frame[place + len(data) :]


@pytest.mark.parametrize(
    ("place", "data", "cause", "message"),
    [
        (0, b"HTTP", "garbled", "begins with b'SPDC', got b'HTTP'"),
        (4, bytes([VERSION + 1]), "refused", f"expected version {VERSION} of the protocol, got {VERSION + 1}"),
        (5, b"\0", "garbled", "kind 1 to 5, got 0"),
        (5, b"\6", "garbled", "kind 1 to 5, got 6"),
        (12, struct.pack("<I", MAX_FRAME_BYTES + 1), "refused", f"at most {MAX_FRAME_BYTES} bytes, got {MAX_FRAME_BYTES + 1}"),
        (12, b"\xff" * 4, "refused", "got 4294967295"),
    ],
)
def test_a_wrong_header_is_refused_by_what_is_wrong_with_it(place: int, data: bytes, cause: str, message: str) -> None:
    error = refused(with_header(encode(Kind.REQUEST, b"abc"), place, data))
    assert error.cause == cause
    assert message in str(error)


def test_a_shorter_cap_holds_where_it_is_given() -> None:
    frame = encode(Kind.HELLO, b"x" * 100)
    assert decode_header(frame[:HEADER_BYTES], 100).num_bytes == 100
    with pytest.raises(ExchangeError, match="at most 99 bytes, got 100"):
        decode_header(frame[:HEADER_BYTES], 99)


def test_a_count_of_four_billion_in_a_small_frame_takes_no_memory_and_no_time() -> None:
    billions, started = struct.pack("<I", 2**32 - 1), time.perf_counter()
    for kind in (Kind.REQUEST, Kind.REPLY):
        refused(encode(kind, struct.pack("<f", 1.0) + billions))
        refused(encode(kind, struct.pack("<f", 1.0) + billions + bytes(100)))
        refused(encode(kind, struct.pack("<f", 1.0) + struct.pack("<I", 1) + b"\xff" * 40))
    request = encode_request(Request(1, 1.0, [Ask(1, 0, 0, np.array([1], dtype=np.int32), 3)]))
    for place in range(HEADER_BYTES, len(request) - 3):
        decode_or_refuse(with_header(request, place, billions))
    assert time.perf_counter() - started < 1


def decode_or_refuse(frame: bytes) -> object:
    """What a frame says, None if it is refused; anything else that happens is a fault."""
    try:
        return decode_any(frame)
    except ExchangeError as error:
        assert error.cause in CAUSES
        return None


@pytest.mark.parametrize("added", [[-1], [3, -(2**31), 5]])
def test_a_request_with_an_id_below_0_is_refused(added: list[int]) -> None:
    ask = Ask(1, 0, 0, np.array(added, dtype=np.int32), 3)
    assert f"got {min(added)}" in str(refused(encode_request(Request(1, 1.0, [ask]))))


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_a_time_that_is_none_is_refused(seconds: float) -> None:
    assert "at least 0 seconds" in str(refused(encode_request(Request(1, seconds, []))))
    assert "at least 0 seconds" in str(refused(encode_reply(Reply(1, seconds, []))))


def reply_of(tokens: list[int], support: list[int], q: list[float], dtype: torch.dtype = torch.float32) -> bytes:
    """A reply of one draft whose every token has the same support and q."""
    rows = torch.tensor([support] * len(tokens)), torch.tensor([q] * len(tokens), dtype=dtype)
    return encode_reply(Reply(1, 0.0, [Answer(Draft(tokens, *rows))]))


@pytest.mark.parametrize("token", [-1, 5000, 2**31 - 1, -(2**31)])
def test_a_reply_with_an_id_that_the_target_does_not_have_is_refused(token: int) -> None:
    assert decode_any(reply_of([4, 4999], [0, 4999], [0.5, 0.5])) is not None
    for frame in (
        reply_of([4, token], [0, 1], [0.5, 0.5]),
        reply_of([4, 4999], [0, token], [0.5, 0.5]),
        encode_reply(Reply(1, 0.0, [Answer(Draft.certain([0, token]))])),
    ):
        assert "token ids in [0, 5000)" in str(refused(frame))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "q", [[float("nan"), 1.0], [float("inf"), 0.0], [-0.5, 1.5], [0.5, 0.4], [0.6, 0.5], [0.0, 0.0], [1e30, -1e30]]
)
def test_a_q_that_is_no_distribution_is_refused(q: list[float], dtype: torch.dtype) -> None:
    assert refused(reply_of([4, 3], [0, 1], q, dtype)).cause == "garbled"


def introduction(**values: Any) -> bytes:
    """A request that introduces a sequence with these values in the place of its own."""
    about = {"id": "a", "num_prompt_tokens": 1, "seed": 0, "max_tokens": 9, "params": {}, **values}
    ask = Ask(1, 0, 0, np.array([1], dtype=np.int32), 3, Introduction("a", 1, SamplingParams(), 0))
    frame = encode_request(Request(1, 1.0, [ask]))
    start, said = frame.index(b"{"), json.dumps(about).encode()
    head = frame[: start - 4 - 4] + struct.pack("<I", len(said)) + frame[start - 4 : start]  # its length is before the ids
    return head[:12] + struct.pack("<I", len(head) + len(said) - HEADER_BYTES) + head[HEADER_BYTES:] + said


def test_an_introduction_with_its_own_values_is_understood() -> None:
    assert decode_any(introduction()) is not None


@pytest.mark.parametrize(
    "values",
    [
        {"id": None},
        {"num_prompt_tokens": "many"},
        {"num_prompt_tokens": 1.5},
        {"num_prompt_tokens": float("inf")},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": float("nan")},
        {"seed": []},
        {"params": None},
        {"params": []},
        {"params": {"temperature": -1}},
        {"params": {"temperature": float("nan")}},
        {"params": {"temperature": "hot"}},
        {"params": {"top_k": 2.5}},
        {"params": {"top_p": 0}},
        {"params": {"max_tokens": float("inf")}},
        {"params": {"max_tokens": 0}},
        {"params": {"seed": -1}},
        {"params": {"verifier": "none"}},
        {"params": {"logit_bias": [1, 2]}},
        {"params": {"logit_bias": {"a": 1.0}}},
        {"params": {"logit_bias": {"-70": 1.0}}},
        {"params": {"logit_bias": {"1": float("nan")}}},
        {"params": {"allowed_token_ids": []}},
        {"params": {"allowed_token_ids": [-1]}},
        {"params": {"stop_token_ids": ["a"]}},
        {"params": {"stop_token_ids": [-3]}},
        {"params": {"stop_token_ids": 3}},
        {"params": {"bad_words_ids": "abc"}},
        {"params": {"bad_words_ids": [[1], []]}},
        {"params": {"bad_words_ids": [[1, -2]]}},
        {"params": {"bad_words_ids": [[2**31]]}},
        {"params": {"min_tokens": 500}},
    ],
    ids=str,
)
def test_an_introduction_that_contradicts_the_rules_is_refused(values: dict[str, Any]) -> None:
    assert refused(introduction(**values)).cause == "garbled"


def test_a_parameter_that_the_draft_does_not_know_is_refused_by_name() -> None:
    """A newer target may ask for what this draft could not heed, and q would be the worse for it."""
    error = refused(introduction(params={"top_a": 0.2}))
    assert error.cause == "refused"
    assert "top_a" in str(error)


@pytest.mark.parametrize("said", [b"", b"{", b"[]", b"3", b'"id"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000])
def test_what_is_no_json_object_is_refused(said: bytes) -> None:
    assert refused(encode(Kind.HELLO, b"k" * KEY_BYTES + said)).cause == "garbled"


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 0},
        {"vocab_size": -5},
        {"vocab_size": float("inf")},
        {"vocab_size": 2**40},
        {"name": None},
        {"eos_token_ids": None},
        {"eos_token_ids": ["end"]},
    ],
    ids=str,
)
def test_a_hello_of_an_impossible_model_is_refused(change: dict[str, Any]) -> None:
    about = {"name": "m", "vocabulary_id": "v", "vocab_size": 10, "eos_token_ids": [1], **change}
    assert refused(encode(Kind.HELLO, b"k" * KEY_BYTES + json.dumps(about).encode())).cause == "garbled"


# Whatever comes


def mutated(rng: random.Random, frame: bytes) -> bytes:
    data = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        kind, place = rng.randrange(4), rng.randrange(len(data))
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x01\0\0\0", b"\0\0\0\x80"])
        elif kind == 2:
            del data[place : place + rng.randint(1, 20)]
        else:
            data[place:place] = rng.randbytes(rng.randint(1, 20))
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("seed", range(3))
def test_no_frame_with_faults_does_anything_but_be_read_or_be_refused(seed: int) -> None:
    rng, whole = random.Random(seed), frames()
    num_read = 0
    for number in range(2500):
        frame = mutated(rng, whole[number % 3])
        num_read += decode_or_refuse(frame) is not None
        decode_or_refuse(whole[number % 3][:HEADER_BYTES] + frame[HEADER_BYTES:])
    assert num_read > 100  # else nothing but headers was tried


@pytest.mark.parametrize("seed", range(2))
def test_no_garbage_does_anything_but_be_read_or_be_refused(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(1500):
        garbage = rng.randbytes(rng.randrange(200))
        decode_or_refuse(garbage)
        for kind in Kind:
            decode_or_refuse(encode(kind, garbage))


def test_what_is_read_of_frames_with_faults_never_makes_a_pass_fail() -> None:
    """A pass is shared by all targets, so that what one of them says must not end it."""
    rng, num_drafted = random.Random(0), 0
    for kind in GREEDY + SAMPLED + COUPLED:
        params = SamplingParams(**{"max_tokens": 20, **kind})
        ask = Ask(1, 0, 0, np.array([1, 2, 3], dtype=np.int32), 3, Introduction("a", 2, params, 5))
        whole = encode_request(Request(1, 1e9, [ask]))
        digits = [place for place in range(whole.index(b"{"), len(whole)) if whole[place : place + 1].isdigit()]
        for number in range(80):
            frame = bytearray(whole)
            if number % 2:
                frame[rng.randrange(HEADER_BYTES, len(frame))] ^= 1 << rng.randrange(8)
            else:
                frame[rng.choice(digits)] = rng.choice(b"0123456789-.e")
            schedule = scheduler(run_ahead=True)
            try:
                schedule.submit(schedule.open(TOKENS), decode_request(*parts(bytes(frame))))
            except ExchangeError:
                continue
            for _ in range(8):
                if schedule.has_work:
                    schedule.step()
            num_drafted += schedule.metrics.num_extended > 0
    assert num_drafted > 300  # else there was nothing that could fail


def test_a_frame_is_the_same_on_every_machine() -> None:
    """All numbers are little-endian."""
    frame = encode_request(Request(0x01020304, 1.0, [Ask(5, 6, 7, np.array([8], dtype=np.int32), 9)]))
    assert frame[:HEADER_BYTES] == b"SPDC" + bytes(
        [VERSION, Kind.REQUEST, 0, 0, 4, 3, 2, 1, len(frame) - HEADER_BYTES, 0, 0, 0]
    )
    assert frame[HEADER_BYTES:].hex() == ("0000803f010000000500000006000000070000000100000009000000000008000000")
