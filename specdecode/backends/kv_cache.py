"""Rows of keys and values, and what each row remembers. Knows tensors and tokens, no model and no request.

A row is one sequence's place in the cache, as wide in every layer as the cache is long. Rolling a sequence back is
remembering fewer of its tokens: no memory moves. A batch is always a contiguous range of rows, so that attention reads a
slice of the cache and never a gathered copy.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

_LENGTH_STEP = 256
# What one more call of attention costs, in tokens of a row that it would read in the same time.
_CALL_TOKENS = 128


@dataclass
class RowMemo:
    """What a row holds: the tokens whose keys and values it has, for the sequence `id`."""

    id: str | None = None
    tokens: list[int] = field(default_factory=list)
    last_used: int = 0


@dataclass(frozen=True)
class Span:
    """Rows [first, last) of a window, of which none holds more than the first `length` positions."""

    first: int
    last: int
    length: int


@dataclass(frozen=True)
class Window:
    """The part of the cache that one forward pass works on: rows [first, last), the first `length` positions of each."""

    first: int
    last: int
    length: int
    slots: torch.Tensor  # [num_rows * num_new_tokens], where each new key goes, in units of positions
    spans: tuple[Span, ...]  # all rows, so that what attention reads of them is little longer than they are
    copies: dict[torch.device, torch.Tensor] = field(default_factory=dict)  # of the slots, for layers on other devices

    def slots_on(self, device: torch.device) -> torch.Tensor:
        """The slots on a layer's device, copied there once for all layers that it has."""
        if device == self.slots.device:
            return self.slots
        if device not in self.copies:
            self.copies[device] = self.slots.to(device)
        return self.copies[device]


class RowCache(Cache):
    """A `transformers` cache of preallocated rows, each with a length of its own.

    `seat` gives the sequences of a batch their rows; `open` says where the next forward pass reads and writes; the model's
    attention layers then call `update`. Each layer's rows are on the device of its keys. One more position at the end of each
    row takes the keys of padding.

    Args:
        num_layers: of the model.
        max_rows: how many sequences are remembered at the most, and the largest batch.
        max_length: the longest sequence, in tokens.
    """

    def __init__(self, num_layers: int, max_rows: int, max_length: int) -> None:
        super().__init__(layers=[RowLayer() for _ in range(num_layers)])
        self.max_rows = max_rows
        self.max_length = max_length
        self.rows: list[RowMemo] = []
        self._length = 0
        self._clock = 0

    def seat(self, ids: Sequence[str], sequences: Sequence[list[int]]) -> list[int]:
        """Finds a row for every sequence, new ones in the place of the longest unused, and makes the rows contiguous.

        A new sequence starts with the longest prefix that any row has of it.

        Returns:
            the rows' numbers, in the order of `ids`; together they are a range without a gap.
        """
        assert len(set(ids)) == len(ids), "a sequence stands in the batch twice"
        assert len(ids) <= self.max_rows, f"a batch of {len(ids)} does not fit a cache of {self.max_rows} rows"
        self._clock += 1
        self._reserve_length(max(map(len, sequences)))
        places = {row.id: number for number, row in enumerate(self.rows)}
        for id in ids:
            if id in places:
                self.rows[places[id]].last_used = self._clock
        for id, tokens in zip(ids, sequences, strict=True):
            if id not in places:
                places[id] = self._take_row(id, tokens)
        numbers = [places[id] for id in ids]
        return numbers if _is_range(numbers) else self._compact(numbers)

    def longest_prefix(self, tokens: list[int]) -> int:
        """Counts the leading `tokens` that some row holds, with which a new sequence would start."""
        return max((common_prefix_length(memo.tokens, tokens) for memo in self.rows), default=0)

    def remembered(self, row: int, tokens: list[int]) -> int:
        """Counts the leading `tokens` whose keys and values the row holds, and forgets whatever else it holds."""
        memo = self.rows[row]
        memo.tokens = memo.tokens[: common_prefix_length(memo.tokens, tokens)]
        return len(memo.tokens)

    def open(self, first: int, last: int, starts: Sequence[int], ends: Sequence[int], device: torch.device) -> Window:
        """Directs the next forward pass, in which row `first + i` gets keys for positions starts[i] to ends[i].

        New tokens are aligned to the right: the rows with fewer of them are padded in front.
        """
        num_new = max(end - start for start, end in zip(starts, ends, strict=True))
        stride = self._length + 1
        position = np.array(ends)[:, None] - num_new + np.arange(num_new)  # [rows, num_new]
        position = np.where(position < np.array(starts)[:, None], self._length, position)
        slots = position + (np.arange(first, last) * stride)[:, None]
        spans = split_rows(ends) if device.type == "cpu" else (Span(0, last - first, max(ends)),)
        window = Window(first, last, max(ends), torch.from_numpy(slots.ravel()).to(device), spans)
        for layer in self.layers:
            layer.window = window
        return window

    @property
    def spans(self) -> tuple[Span, ...]:
        """The rows of the open window, by what attention should read of them."""
        window = self.layers[0].window
        assert window is not None
        return window.spans

    def remember(self, row: int, tokens: list[int]) -> None:
        """Notes that the row now holds the keys and values of exactly `tokens`."""
        self.rows[row].tokens = tokens

    def reserve(self) -> None:
        """Takes the memory for all rows at full length; a layer that has no keys yet takes its part when they arrive."""
        self._length = self.max_length
        for layer in self.layers:
            layer.resize(self.max_rows, self.max_length)

    def forget(self) -> None:
        """Forgets every row, and keeps the memory."""
        self.rows.clear()

    def clear(self) -> None:
        """Forgets everything, and gives the memory back."""
        self.rows.clear()
        self._length = 0
        for layer in self.layers:
            layer.resize(0, 0)

    def num_bytes(self) -> int:
        """The memory that keys and values take."""
        return sum(layer.num_bytes() for layer in self.layers)

    def num_bytes_per_token(self) -> int:
        """The memory that one token takes in all layers; 0 before the first keys arrive."""
        return sum(layer.num_bytes_per_token() for layer in self.layers)

    def num_bytes_reserved(self) -> int:
        """The memory that all rows take at full length, the position for padding included."""
        return self.max_rows * (self.max_length + 1) * self.num_bytes_per_token()

    def check(self) -> None:
        """Asserts that rows, memos and layers agree with each other."""
        ids = [memo.id for memo in self.rows]
        assert len(set(ids)) == len(ids), f"two rows are of one sequence: {ids}"
        assert len(ids) <= self.max_rows, f"{len(ids)} rows are remembered, more than max_rows {self.max_rows}"
        longest = max((len(memo.tokens) for memo in self.rows), default=0)
        assert longest <= self._length, f"a row remembers {longest} tokens in a cache of length {self._length}"
        assert self._length <= self.max_length, f"the cache is {self._length} long, more than max_length {self.max_length}"
        for number, layer in enumerate(self.layers):
            assert len(ids) <= layer.num_rows <= self.max_rows, f"layer {number} has {layer.num_rows} rows for {len(ids)} memos"
            assert layer.length == self._length, f"layer {number} has length {layer.length}, the cache {self._length}"
            layer.check()
        assert len({layer.num_rows for layer in self.layers}) <= 1, "the layers have unequal numbers of rows"

    def _take_row(self, id: str, tokens: list[int]) -> int:
        if len(self.rows) < self.max_rows:
            self.rows.append(RowMemo())
            self._reserve_rows()
            row = len(self.rows) - 1
        else:
            row = min(range(len(self.rows)), key=lambda number: self.rows[number].last_used)
        shared = [common_prefix_length(memo.tokens, tokens) for memo in self.rows]
        donor = max(range(len(self.rows)), key=lambda number: (shared[number], number == row))
        if donor != row:
            self._copy(donor, row, shared[donor])
        self.rows[row] = RowMemo(id, tokens[: shared[donor]], self._clock)
        return row

    def _copy(self, source: int, target: int, length: int) -> None:
        for layer in self.layers:
            layer.copy(source, target, length)

    def _compact(self, numbers: list[int]) -> list[int]:
        """Swaps rows until the batch stands in rows 0 to n - 1, each moved row into a hole."""
        holes = iter(sorted(set(range(len(numbers))) - set(numbers)))
        compacted = []
        for number in numbers:
            if number < len(numbers):
                compacted.append(number)
                continue
            hole = next(holes)
            length = max(len(self.rows[number].tokens), len(self.rows[hole].tokens))
            for layer in self.layers:
                layer.swap(number, hole, length)
            self.rows[number], self.rows[hole] = self.rows[hole], self.rows[number]
            compacted.append(hole)
        return compacted

    def _reserve_rows(self) -> None:
        if self.layers[0].num_rows < len(self.rows):
            num_rows = min(self.max_rows, max(4, 2 * len(self.rows)))
            for layer in self.layers:
                layer.resize(num_rows, self._length)

    def _reserve_length(self, length: int) -> None:
        if length > self._length:
            rounded = -(-length // _LENGTH_STEP) * _LENGTH_STEP
            self._length = max(length, min(self.max_length, max(2 * self._length, rounded)))
            for layer in self.layers:
                layer.resize(layer.num_rows, self._length)


class RowLayer(CacheLayerMixin):
    """One layer's keys and values, [num_rows, length + 1, num_heads, head_dim] each; allocated when the first keys arrive."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.num_rows = 0
        self.length = 0
        self.window: Window | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the rows in the shape, dtype and device of the first keys and values."""
        self.keys, self.values = self._allocate(key_states), self._allocate(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new keys and values, [rows, num_heads, num_new, head_dim], and returns the window's."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._write(self.keys, key_states), self._write(self.values, value_states)

    def resize(self, num_rows: int, length: int) -> None:
        """Changes the room for rows and positions, and keeps what fits."""
        old_keys, old_values = self.keys, self.values
        self.num_rows, self.length = num_rows, length
        if self.is_initialized:
            self.keys, self.values = self._grow(old_keys), self._grow(old_values)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one row to another."""
        for states in self._states():
            states[target, :length] = states[source, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchanges the first `length` positions of two rows."""
        for states in self._states():
            kept = states[one, :length].clone()
            states[one, :length] = states[other, :length]
            states[other, :length] = kept

    def num_bytes(self) -> int:
        """The memory that this layer takes."""
        return sum(states.nbytes for states in self._states())

    def num_bytes_per_token(self) -> int:
        """The memory of one position of one row; 0 before the first keys arrive."""
        return sum(math.prod(states.shape[2:]) * states.element_size() for states in self._states())

    def check(self) -> None:
        """Asserts that keys and values have the room that the layer says they have."""
        for states in self._states():
            room = (self.num_rows, self.length + 1)
            assert states.shape[:2] == room, f"keys or values have room for {tuple(states.shape[:2])}, the layer for {room}"

    def get_seq_length(self) -> int:
        """The window's length; rows have lengths of their own."""
        return self.window.length if self.window else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are passed explicitly; the whole window is visible to them."""
        del query_length
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        """The room for positions."""
        return self.length

    def _write(self, states: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        assert self.window is not None
        flat = new.transpose(1, 2).reshape(-1, *states.shape[2:])  # [rows * num_new, num_heads, head_dim]
        states.view(-1, *states.shape[2:]).index_copy_(0, self.window.slots_on(states.device), flat)
        return states[self.window.first : self.window.last, : self.window.length].transpose(1, 2)

    def _states(self) -> tuple[torch.Tensor, ...]:
        return (self.keys, self.values) if self.is_initialized else ()

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros, not empty: a masked position's value is multiplied by zero, and must not be NaN.
        return like.new_zeros(self.num_rows, self.length + 1, like.shape[1], like.shape[3])

    def _grow(self, old: torch.Tensor) -> torch.Tensor:
        new = old.new_zeros(self.num_rows, self.length + 1, *old.shape[2:])
        rows, length = min(len(old), len(new)), min(old.shape[1], new.shape[1]) - 1
        new[:rows, :length] = old[:rows, :length]
        return new


def split_rows(lengths: Sequence[int]) -> tuple[Span, ...]:
    """Splits rows of these lengths, in their order, where reading all as long as the longest costs more than one more call.

    Neighbours are joined from the first on, so that the split is good and not the best.
    """
    spans: list[Span] = []
    for row, length in enumerate(lengths):
        span = Span(row, row + 1, length)
        while spans and _num_wasted(spans[-1], span) <= _CALL_TOKENS:
            before = spans.pop()
            span = Span(before.first, span.last, max(before.length, span.length))
        spans.append(span)
    return tuple(spans)


def _num_wasted(one: Span, other: Span) -> int:
    """How many tokens are read in vain if both are one."""
    shorter = min(one, other, key=lambda span: span.length)
    return (shorter.last - shorter.first) * abs(one.length - other.length)


def common_prefix_length(one: list[int], other: list[int]) -> int:
    """Counts the leading tokens that two sequences share."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return bisect_left(range(length), True, key=lambda end: one[: end + 1] != other[: end + 1])


def _is_range(numbers: list[int]) -> bool:
    return max(numbers) - min(numbers) + 1 == len(numbers)
