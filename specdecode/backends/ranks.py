"""Rows in on the first process of a model, the same rows out on all others: how they compute every pass together.

With tensor parallelism each process, a rank, has a part of every layer, and a forward pass is one of all ranks. What a rank
remembers is a function of the rows that it was asked for, so that all ranks do the same with the same rows.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from specdecode.backends.backend import Row
from specdecode.backends.kv_cache import common_prefix_length
from specdecode.errors import ModelError

_END = -1
_JOIN_TIMEOUT = timedelta(minutes=5)
_FOREVER = timedelta(days=1000)  # how long the others may wait for the next request


def join(rank: int, size: int, folder: str) -> None:
    """Connects the processes of one machine: all that name the same folder, each with a number of its own.

    Raises:
        ModelError: not all were there in time.
    """
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")  # what they say to each other is for nobody else
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store = distributed.FileStore(str(Path(folder) / "store"), size)
    try:
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_JOIN_TIMEOUT)
    except distributed.DistError as error:
        raise ModelError(f"tp: expected {size} processes within {_JOIN_TIMEOUT.total_seconds():g} s: {error}") from error


class Ranks:
    """A model in several processes, which torch.distributed knows; the first one leads.

    Args:
        size: how many there are.
        max_rows: for how many sequences the tokens that were told are kept, so that only new ones need be.

    Attributes:
        rank: this process's number.

    Raises:
        ModelError: torch.distributed is not set up for so many.
    """

    def __init__(self, size: int, max_rows: int) -> None:
        found = distributed.get_world_size() if distributed.is_initialized() else 1
        if found != size:
            raise ModelError(f"tp: expected {size} processes that torch.distributed connects, got {found}")
        self.rank = distributed.get_rank()
        self._group = distributed.new_group(backend="gloo", timeout=_FOREVER)
        self._words = RowWords(max_rows)
        self._error: BaseException | None = None

    @contextmanager
    def step(self, rows: Sequence[Row]) -> Iterator[None]:
        """Has all ranks make the pass that is made within, if this is the first.

        Raises:
            ModelError: a pass has failed before, and the ranks are no longer in step.
        """
        if self.rank > 0:
            yield
            return
        self.check()
        try:
            self._send(self._words.encode(rows))
            yield
        except BaseException as error:
            self._error = error
            raise

    def check(self) -> None:
        """Raises a `ModelError` if a pass has failed, after which the others may be anywhere."""
        if self._error is not None:
            raise ModelError(f"the ranks of the model are out of step: {self._error!r}") from self._error

    def requests(self) -> Iterator[list[Row]]:
        """What the first rank passes over, until that ends."""
        while (words := self._receive()) != [_END]:
            yield self._words.decode(words)

    def end(self) -> None:
        """Lets the others go."""
        if self.rank == 0 and self._error is None:
            self._send([_END])

    def _send(self, words: list[int]) -> None:
        for message in (torch.tensor([len(words)]), torch.tensor(words)):
            distributed.broadcast(message, src=0, group=self._group)

    def _receive(self) -> list[int]:
        length = torch.zeros(1, dtype=torch.long)
        distributed.broadcast(length, src=0, group=self._group)
        words = torch.zeros(int(length), dtype=torch.long)
        distributed.broadcast(words, src=0, group=self._group)
        received: list[int] = words.tolist()
        return received


class RowWords:
    """Rows as whole numbers, and back: of a sequence that was told before, only what is new.

    Args:
        max_rows: for how many sequences either side keeps what was told last.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._numbers = count()
        self._told: dict[str, tuple[int, list[int]]] = {}  # by the sequence's id, the longest unused first
        self._heard: dict[int, list[int]] = {}  # the same on the other side, by its number

    def encode(self, rows: Sequence[Row]) -> list[int]:
        """For each row its number, how many tokens are as told before, how many are new, how many are scored, the new ones."""
        words = [len(rows)]
        for row in rows:
            number, known = self._told.pop(row.id) if row.id in self._told else (next(self._numbers), [])
            base = common_prefix_length(known, row.tokens)
            words += [number, base, len(row.tokens) - base, row.num_scored, *row.tokens[base:]]
            self._told[row.id] = (number, list(row.tokens))
        _keep_latest(self._told, self._max_rows)
        return words

    def decode(self, words: list[int]) -> list[Row]:
        """The rows; their ids are the numbers."""
        rows, place = [], 1
        for _ in range(words[0]):
            number, base, num_new, num_scored = words[place : place + 4]
            place += 4 + num_new
            tokens = self._heard.pop(number, [])[:base] + words[place - num_new : place]
            self._heard[number] = tokens
            rows.append(Row(str(number), tokens, num_scored))
        _keep_latest(self._heard, self._max_rows)
        return rows


def _keep_latest(memory: dict[Any, Any], size: int) -> None:
    for key in list(memory)[: max(0, len(memory) - size)]:
        del memory[key]
