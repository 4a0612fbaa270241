"""Messages in, bytes out, and back. Nothing is ever unpickled; a frame that is not as it should be is an `ExchangeError`.

A frame is a header of 16 bytes and a payload, all little-endian:

    magic "SPDC" | version u8 | kind u8 | flags u16 | round u32 | length of the payload u32

    HELLO    the session's key, 16 bytes; JSON of the target's `ModelTokens`
    WELCOME  nothing
    REFUSAL  one line of text
    REQUEST  patience f32 | asks u32, then for each ask
             number u32 | known u32 | checksum u32 | added u32 | k u16 | introduction u32,
             the added ids i32, the introduction's JSON
    REPLY    busy f32 | answers u32, then for each answer
             flags u8 | bytes of a q u8 | k u16 | m u16 | ahead u16,
             the ids i32 [k], and unless m is 0 support i32 [k, m], q [k, m]

m is 0 where q is 1 at each drafted token.
"""

import json
import struct
from dataclasses import asdict, dataclass, fields
from enum import IntEnum, IntFlag
from typing import Any

import numpy as np
import torch

from specdecode.decoding.sequence import Draft, SamplingParams
from specdecode.errors import RequestError
from specdecode.exchange.messages import Answer, Ask, ExchangeError, Introduction, ModelTokens, Reply, Request

VERSION = 1
KEY_BYTES = 16
MAX_FRAME_BYTES = 16 << 20

_MAGIC = b"SPDC"
_HEADER = struct.Struct("<4sBBHII")
_COUNTED = struct.Struct("<fI")
_ASK = struct.Struct("<IIIIHI")
_ANSWER = struct.Struct("<BBHHH")
_Q_DTYPES = {4: np.float32, 8: np.float64}
# What a draft has no use for, and what is different at the target for each of its answers.
_UNSENT = {"max_tokens", "logprobs", "prompt_logprobs", "seed"}

HEADER_BYTES = _HEADER.size


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    WELCOME = 2
    REFUSAL = 3
    REQUEST = 4
    REPLY = 5


class _Flag(IntFlag):
    UNKNOWN = 1
    CONTINUES = 2


@dataclass(frozen=True)
class Header:
    """The beginning of a frame."""

    kind: Kind
    round: int
    num_bytes: int


def decode_header(data: bytes, max_bytes: int = MAX_FRAME_BYTES) -> Header:
    """Reads the first `HEADER_BYTES` of a frame.

    Raises:
        ExchangeError: the other side speaks another protocol or version, or says more than `max_bytes` at a time.
    """
    magic, version, kind, _, round, num_bytes = _HEADER.unpack(data)
    if magic != _MAGIC:
        raise ExchangeError("garbled", f"expected a frame that begins with {_MAGIC!r}, got {magic!r}")
    if version != VERSION:
        raise ExchangeError("refused", f"expected version {VERSION} of the protocol, got {version}")
    if num_bytes > max_bytes:
        raise ExchangeError("refused", f"expected a frame of at most {max_bytes} bytes, got {num_bytes}")
    if kind not in set(Kind):
        raise ExchangeError("garbled", f"expected a frame of kind 1 to {len(Kind)}, got {kind}")
    return Header(Kind(kind), round, num_bytes)


def encode(kind: Kind, payload: bytes = b"", round: int = 0) -> bytes:
    """Makes a frame."""
    return _HEADER.pack(_MAGIC, VERSION, kind, 0, round, len(payload)) + payload


def encode_hello(key: bytes, target: ModelTokens) -> bytes:
    """Makes the frame with which a target claims its session."""
    about = {**asdict(target), "eos_token_ids": sorted(target.eos_token_ids)}
    return encode(Kind.HELLO, key + json.dumps(about).encode())


def decode_hello(payload: bytes) -> ModelTokens:
    """Reads who the target is; its key is the first `KEY_BYTES`.

    Raises:
        ExchangeError: it is no such payload.
    """
    values = _json(payload[KEY_BYTES:])
    try:
        return ModelTokens(
            str(values["name"]),
            str(values["vocabulary_id"]),
            int(values["vocab_size"]),
            frozenset(int(token) for token in values["eos_token_ids"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ExchangeError("garbled", f"a hello that says nothing of its model: {error!r}") from error


def encode_request(request: Request) -> bytes:
    """Makes the frame of a request."""
    parts = [_COUNTED.pack(request.patience_s, len(request.asks))]
    for ask in request.asks:
        about = b"" if ask.introduction is None else _encode_introduction(ask.introduction)
        parts.append(_ASK.pack(ask.number, ask.num_known, ask.checksum, len(ask.added), ask.k, len(about)))
        parts += (ask.added.astype("<i4").tobytes(), about)
    return encode(Kind.REQUEST, b"".join(parts), request.round)


def decode_request(round: int, payload: bytes) -> Request:
    """Reads a request.

    Raises:
        ExchangeError: it is no such payload.
    """
    reader = _Reader(payload)
    patience_s, count = reader.unpack(_COUNTED)
    asks = []
    for _ in range(count):
        number, num_known, known, num_added, k, num_about = reader.unpack(_ASK)
        added = reader.array("<i4", num_added)
        if num_added and added.min() < 0:
            raise ExchangeError("garbled", f"expected token ids of at least 0, got {added.min()}")
        about = reader.bytes(num_about)
        asks.append(Ask(number, num_known, known, added, k, _decode_introduction(about) if num_about else None))
    reader.end()
    return Request(round, patience_s, asks)


def encode_reply(reply: Reply) -> bytes:
    """Makes the frame of a reply."""
    parts = [_COUNTED.pack(reply.busy_s, len(reply.answers))]
    for answer in reply.answers:
        draft = answer.draft
        if draft is None:
            parts.append(_ANSWER.pack(_Flag.UNKNOWN, 4, 0, 0, 0))
            continue
        flags = _Flag.CONTINUES if draft.continues else _Flag(0)
        width = draft.q.shape[1] if draft.tokens and draft.q.shape[1] > 1 else 0
        q = draft.q.numpy()
        parts.append(_ANSWER.pack(flags, q.itemsize, len(draft.tokens), width, answer.num_ahead))
        parts.append(np.array(draft.tokens, dtype="<i4").tobytes())
        if width:
            parts += (draft.support.numpy().astype("<i4").tobytes(), q.tobytes())
    return encode(Kind.REPLY, b"".join(parts), reply.round)


def decode_reply(round: int, payload: bytes, vocab_size: int) -> Reply:
    """Reads a reply in which nothing is out of its range.

    Raises:
        ExchangeError: it is no such payload.
    """
    reader = _Reader(payload)
    busy_s, count = reader.unpack(_COUNTED)
    answers, supports, qs = [], [], []
    for _ in range(count):
        flags, itemsize, k, width, num_ahead = reader.unpack(_ANSWER)
        if flags & _Flag.UNKNOWN:
            answers.append(Answer(None))
            continue
        tokens = reader.array("<i4", k)
        supports.append(tokens)
        continues = bool(flags & _Flag.CONTINUES) and k > 0
        if not width:
            draft = Draft.certain(tokens.tolist()) if k else Draft.empty()
            answers.append(Answer(_continuing(draft) if continues else draft, num_ahead))
            continue
        if itemsize not in _Q_DTYPES:
            raise ExchangeError("garbled", f"expected a q of 4 or 8 bytes, got {itemsize}")
        support = reader.array("<i4", k * width).reshape(k, width)
        q = reader.array(_Q_DTYPES[itemsize], k * width).reshape(k, width)
        supports.append(support.ravel())
        qs.append(q)
        draft = Draft(tokens.tolist(), torch.from_numpy(support.astype(np.int64)), torch.from_numpy(q.copy()), continues)
        answers.append(Answer(draft, num_ahead))
    reader.end()
    _check_ids(supports, vocab_size)
    for q in qs:
        _check_q(q)
    return Reply(round, busy_s, answers)


def _continuing(draft: Draft) -> Draft:
    return Draft(draft.tokens, draft.support, draft.q, True)


def _check_ids(ids: list[np.ndarray], vocab_size: int) -> None:
    every = np.concatenate(ids) if ids else np.zeros(1, dtype=np.int32)
    if every.size and not 0 <= every.min() <= every.max() < vocab_size:
        raise ExchangeError("garbled", f"expected token ids in [0, {vocab_size}), got {every.min()} to {every.max()}")


def _check_q(q: np.ndarray) -> None:
    """Raises unless every row is a distribution, with which a wrong draft can make a round slower, but never fail."""
    sums = q.sum(-1)
    if not (q.min() >= 0 and abs(sums - 1).max() < 1e-3):  # also false for what is not a number
        raise ExchangeError(
            "garbled", f"expected probabilities that sum to 1, got {q.min()} and more, summing to {sums.tolist()}"
        )


def _encode_introduction(introduction: Introduction) -> bytes:
    params, default = introduction.params, SamplingParams()
    changed = {field.name: getattr(params, field.name) for field in fields(params) if field.name not in _UNSENT}
    changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
    values = {
        "id": introduction.id,
        "num_prompt_tokens": introduction.num_prompt_tokens,
        "seed": introduction.seed,
        "max_tokens": params.max_tokens,
        "params": {name: sorted(value) if isinstance(value, frozenset) else value for name, value in changed.items()},
    }
    return json.dumps(values).encode()


def _decode_introduction(data: bytes) -> Introduction:
    values = _json(data)
    try:
        params = dict(values["params"])
        if unknown := params.keys() - SamplingParams.__dataclass_fields__.keys():
            raise ExchangeError("refused", f"unknown sampling parameters: {', '.join(sorted(unknown))}")
        if "logit_bias" in params:
            params["logit_bias"] = {int(token): float(bias) for token, bias in params["logit_bias"].items()}
        sampling = SamplingParams(max_tokens=int(values["max_tokens"]), **params)
        return Introduction(str(values["id"]), int(values["num_prompt_tokens"]), sampling, int(values["seed"]))
    except (KeyError, TypeError, ValueError, AttributeError, RequestError) as error:
        raise ExchangeError("garbled", f"an introduction that cannot be read: {error!r}") from error


def _json(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError as error:
        raise ExchangeError("garbled", f"expected JSON: {error}") from error
    if not isinstance(values, dict):
        raise ExchangeError("garbled", f"expected a JSON object, got {type(values).__name__}")
    return values


class _Reader:
    """Reads a payload from its beginning to its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def unpack(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.bytes(layout.size))

    def array(self, dtype: Any, count: int) -> np.ndarray:
        dtype = np.dtype(dtype)
        return np.frombuffer(self.bytes(count * dtype.itemsize), dtype)

    def bytes(self, count: int) -> bytes:
        end = self._place + count
        if end > len(self._data):
            raise ExchangeError("garbled", f"a frame that ends after {len(self._data)} bytes, where {end} are spoken of")
        part, self._place = self._data[self._place : end], end
        return part

    def end(self) -> None:
        if self._place != len(self._data):
            raise ExchangeError("garbled", f"a frame of {len(self._data)} bytes, where {self._place} are spoken of")
