"""Examples in, blocks of one length out. Knows no model.

Several examples share a block, and a long one is cut where a block ends. Positions begin at 0 with each piece, by which
transformers' models know that a token must not see the pieces before its own.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import numpy as np

from specdecode.training.examples import Example

UNSCORED = -100  # the label of a token that is not learned, as everywhere in torch


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of a training batch, int32 [length] each: ids, their positions within their piece, and what is learned."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    labels: np.ndarray


def pack(examples: Iterable[Example], length: int, pad_id: int) -> Iterator[Block]:
    """Fills one block after the other; the last one is filled up with `pad_id`."""
    pieces: list[Block] = []
    room = length
    for example in examples:
        start = 0
        while start < len(example.ids):
            piece = _piece(example, slice(start, start + room))
            pieces.append(piece)
            start += len(piece.input_ids)
            room -= len(piece.input_ids)
            if room == 0:
                yield _joined(pieces)
                pieces, room = [], length
    if pieces:
        rest = np.full(room, pad_id, dtype=np.int32)
        yield _joined([*pieces, _piece(Example(rest, np.zeros(room, dtype=bool)), slice(None))])


def _piece(example: Example, where: slice) -> Block:
    ids = example.ids[where]
    labels = np.where(example.is_scored[where], ids, np.int32(UNSCORED))
    labels[:1] = UNSCORED  # what comes before it stands in another block
    return Block(ids, np.arange(len(ids), dtype=np.int32), labels)


def _joined(pieces: list[Block]) -> Block:
    return Block(*(np.concatenate([getattr(piece, field.name) for piece in pieces]) for field in fields(Block)))


def interleave(streams: dict[str, Iterator[Block]], weights: dict[str, float], rng: np.random.Generator) -> Iterator[Block]:
    """Blocks of all streams in random order, each drawn with its weight, until one that is drawn has no more."""
    names = list(streams)
    shares = np.array([weights[name] for name in names], dtype=np.float64)
    while (block := next(streams[names[rng.choice(len(names), p=shares / shares.sum())]], None)) is not None:
        yield block


def cycle(examples: list[Example], rng: np.random.Generator) -> Iterator[Example]:
    """The examples without end, in a new random order each time."""
    assert examples, "an endless stream needs something to read"
    while True:
        for index in rng.permutation(len(examples)):
            yield examples[index]
