"""Messages in, bytes out, and back. Nothing is ever unpickled; a frame that is not as it should be is an `ExchangeError`.

A frame is a header of 16 bytes and a payload, all little-endian:

    magic "SPDC" | version u8 | kind u8 | flags u16 | round u32 | length of the payload u32

    HELLO    the session's key, 16 bytes; JSON of the target's `ModelTokens`
    WELCOME  nothing
    REFUSAL  one line of text
    REQUEST  patience f32 | asks u32, then for each ask
             number u32 | known u32 | checksum u32 | added u32 | k u16 | introduction u32,
             the added ids i32, the introduction's JSON
    REPLY    busy f32 | answers u32, then for each answer flags u8 | k u16 | ahead u16, then the ids i32 of all,
             rows n u32 | m u16 | bytes of a number u8, support i32 [n, m], q [n, m]

The rows are those of all drafts whose q is not 1 at each token, which a flag says.
"""

import json
import struct
from dataclasses import asdict, dataclass, fields, replace
from enum import IntEnum, IntFlag
from itertools import chain
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from specdecode.decoding.sequence import Draft, SamplingParams
from specdecode.exchange.messages import Answer, Ask, ExchangeError, Introduction, ModelTokens, Reply, Request

VERSION = 1
KEY_BYTES = 16
MAX_FRAME_BYTES = 16 << 20
MAX_K = 0xFFFF

_MAGIC = b"SPDC"
_HEADER = struct.Struct("<4sBBHII")
_COUNTED = struct.Struct("<fI")
_ASK = struct.Struct("<IIIIHI")
_ANSWER = struct.Struct("<BHH")
_TABLE = struct.Struct("<IHB")
_Q_DTYPES = {4: np.float32, 8: np.float64}
_MAX_IDS = 1 << 31
_UNSENT = {"logprobs", "prompt_logprobs"}  # a draft has no use for them
_MODEL_TOKENS, _INTRODUCTION = TypeAdapter(ModelTokens), TypeAdapter(Introduction)

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
    CERTAIN = 4


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
    if len(data) < HEADER_BYTES:
        raise ExchangeError("garbled", f"expected a header of {HEADER_BYTES} bytes, got {len(data)}")
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
    try:
        target = _MODEL_TOKENS.validate_python(_json(payload[KEY_BYTES:]))
    except ValidationError as error:
        raise ExchangeError("garbled", f"a hello that says nothing of its model: {_first_line(error)}") from error
    if not 0 < target.vocab_size < _MAX_IDS:
        raise ExchangeError("garbled", f"expected a vocabulary of 1 to {_MAX_IDS - 1} tokens, got {target.vocab_size}")
    return target


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
    patience_s, count = reader.counted()
    asks = []
    for _ in range(count):
        number, num_known, known, num_added, k, num_about = reader.unpack(_ASK)
        added = reader.array("<i4", num_added)
        about = reader.bytes(num_about)
        asks.append(Ask(number, num_known, known, added, k, _decode_introduction(about) if num_about else None))
    reader.end()
    if asks:
        _check_ids(np.concatenate([ask.added for ask in asks]), _MAX_IDS)
    return Request(round, patience_s, asks)


def encode_reply(reply: Reply) -> bytes:
    """Makes the frame of a reply."""
    drafts = [answer.draft for answer in reply.answers]
    heads = [_head(answer) for answer in reply.answers]
    ids = [token for draft in drafts if draft is not None for token in draft.tokens]
    uncertain = [draft for draft in drafts if draft is not None and not _is_certain(draft)]
    support, q = _stacked(uncertain)
    parts = [_COUNTED.pack(reply.busy_s, len(heads)), *heads, np.array(ids, dtype="<i4").tobytes()]
    parts += (_TABLE.pack(len(q), q.shape[1], q.itemsize), support.tobytes(), q.tobytes())
    return encode(Kind.REPLY, b"".join(parts), reply.round)


def decode_reply(round: int, payload: bytes, vocab_size: int) -> Reply:
    """Reads a reply in which nothing is out of its range.

    Raises:
        ExchangeError: it is no such payload.
    """
    reader = _Reader(payload)
    busy_s, count = reader.counted()
    heads = list(_ANSWER.iter_unpack(reader.bytes(count * _ANSWER.size)))
    ids = reader.array("<i4", sum(k for _, k, _ in heads))
    num_rows, width, itemsize = reader.unpack(_TABLE)
    if itemsize not in _Q_DTYPES or num_rows != sum(k for flags, k, _ in heads if not flags & _Flag.CERTAIN):
        raise ExchangeError("garbled", f"a table of {num_rows} rows of {itemsize} bytes, which are not those of the answers")
    support = reader.array("<i4", num_rows * width).reshape(num_rows, width)
    q = reader.array(_Q_DTYPES[itemsize], num_rows * width).reshape(num_rows, width)
    reader.end()
    _check_ids(ids, vocab_size)
    _check_ids(support, vocab_size)
    _check_q(q)
    tokens, rows = ids.tolist(), _Rows(torch.from_numpy(support.astype(np.int64)), torch.from_numpy(q.copy()))
    answers, start = [], 0
    for flags, k, num_ahead in heads:
        answers.append(_answer(flags, tokens[start : start + k], num_ahead, rows))
        start += k
    return Reply(round, busy_s, answers)


def _is_certain(draft: Draft) -> bool:
    """Whether q is 1 at each token, so that it need not be said; also where there is none."""
    return not draft.tokens or draft.q.shape[1] == 1


def _head(answer: Answer) -> bytes:
    draft = answer.draft
    if draft is None:
        return _ANSWER.pack(_Flag.UNKNOWN | _Flag.CERTAIN, 0, 0)
    flags = _Flag.CERTAIN * _is_certain(draft) | _Flag.CONTINUES * draft.continues
    return _ANSWER.pack(flags, len(draft.tokens), answer.num_ahead)


def _stacked(drafts: list[Draft]) -> tuple[np.ndarray, np.ndarray]:
    """The supports and the q of all drafts, one row after the other, filled up with zeros to one width."""
    width = max((draft.q.shape[1] for draft in drafts), default=0)
    if not width:
        return np.empty((0, 0), dtype="<i4"), np.empty((0, 0), dtype=np.float32)
    support, q = (
        torch.cat(
            [torch.nn.functional.pad(part, (0, width - part.shape[1])) if part.shape[1] < width else part for part in parts]
        )
        for parts in ([draft.support for draft in drafts], [draft.q for draft in drafts])
    )
    return support.numpy().astype("<i4"), q.numpy()


class _Rows:
    """A table's rows, which are handed out in their order."""

    def __init__(self, support: torch.Tensor, q: torch.Tensor) -> None:
        self._support = support
        self._q = q
        self._place = 0

    def take(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = slice(self._place, self._place + count)
        self._place += count
        return self._support[rows], self._q[rows]


def _answer(flags: int, tokens: list[int], num_ahead: int, rows: _Rows) -> Answer:
    if flags & _Flag.UNKNOWN:
        return Answer(None)
    if not tokens:
        return Answer(Draft.empty(), num_ahead)
    draft = Draft.certain(tokens) if flags & _Flag.CERTAIN else Draft(tokens, *rows.take(len(tokens)))
    return Answer(replace(draft, continues=True) if flags & _Flag.CONTINUES else draft, num_ahead)


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    if ids.size and ids.view("<u4").max() >= vocab_size:  # a negative one looks like a very large one
        raise ExchangeError("garbled", f"expected token ids in [0, {vocab_size}), got {ids.min()} to {ids.max()}")


def _check_q(q: np.ndarray) -> None:
    """Raises unless every row is a distribution: a draft that is wrong may make a round slower, but must not make it fail."""
    if not len(q):
        return
    sums = q.sum(-1)
    if not (q.size and q.min() >= 0 and abs(sums - 1).max() < 1e-3):  # also false for what is not a number
        raise ExchangeError("garbled", "expected probabilities that sum to 1")


def _encode_introduction(introduction: Introduction) -> bytes:
    params, default = introduction.params, SamplingParams()
    changed = {field.name: getattr(params, field.name) for field in fields(params) if field.name not in _UNSENT}
    changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
    values = {
        "id": introduction.id,
        "num_prompt_tokens": introduction.num_prompt_tokens,
        "seed": introduction.seed,
        "params": {name: sorted(value) if isinstance(value, frozenset) else value for name, value in changed.items()},
    }
    return json.dumps(values, default=asdict).encode()  # a grammar is a dataclass


def _decode_introduction(data: bytes) -> Introduction:
    values = _json(data)
    params = values.get("params")
    if isinstance(params, dict) and (unknown := params.keys() - SamplingParams.__dataclass_fields__.keys()):
        raise ExchangeError("refused", f"unknown sampling parameters: {', '.join(sorted(unknown))}")
    try:
        introduction = _INTRODUCTION.validate_python(values)
    except ValidationError as error:
        raise ExchangeError("garbled", f"an introduction that cannot be read: {_first_line(error)}") from error
    params = introduction.params
    ids = {*params.logit_bias, *(params.allowed_token_ids or ()), *params.stop_token_ids, *chain(*params.bad_words_ids)}
    if ids and not 0 <= min(ids) <= max(ids) < _MAX_IDS:
        raise ExchangeError("garbled", f"expected token ids of at least 0 in the sampling parameters, got {min(ids)}")
    if not 0 <= introduction.seed < 2**64:
        raise ExchangeError("garbled", f"expected a seed in [0, 2**64), got {introduction.seed}")
    return introduction


def _first_line(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _json(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
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

    def counted(self) -> tuple[float, int]:
        seconds, count = self.unpack(_COUNTED)
        if not 0 <= seconds < float("inf"):
            raise ExchangeError("garbled", f"expected a time of at least 0 seconds, got {seconds}")
        return seconds, count

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
