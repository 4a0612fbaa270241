"""Vocabulary sizes in, microseconds out: what a grammar adds to each place of an answer."""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import torch

from specdecode.decoding.constraints import Scored, constrain
from specdecode.decoding.sequence import SamplingParams, Sequence
from specdecode.grammar import Grammar, Grammars, Matcher

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "colour": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "age", "tags", "colour"],
    "additionalProperties": False,
}
_TEXT = b'{"name": "hello there world", "age": 42, "tags": ["the first", "second tag", "third"], "colour": "red"}'
_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"


@dataclass(frozen=True)
class MaskRow:
    """What a grammar costs with a vocabulary.

    Attributes:
        prepare_ms: to read the vocabulary, once for each model.
        compile_ms: to compile a schema, once for each.
        first_us: to find the tokens that are allowed, the mean over the places of the first answer to a schema.
        later_us: the same in further answers to it.
        constrain_us: to find them, and forbid the others in a row of logits, in further answers.
    """

    vocab_size: int
    prepare_ms: float
    compile_ms: float
    first_us: float
    later_us: float
    constrain_us: float


def measure_masks(vocab_sizes: list[int], num_answers: int) -> Iterator[MaskRow]:
    """Yields a row for each vocabulary, which is made up of all bytes and random words."""
    for size in vocab_sizes:
        pieces = made_up_pieces(size)
        started = time.perf_counter()
        grammars = Grammars(pieces)
        prepared = time.perf_counter()
        matcher = grammars.matcher(Grammar.json_schema(SCHEMA))
        compiled = time.perf_counter()
        tokens = _cut(matcher, pieces)
        first: list[float] = []
        later: list[float] = []
        constrained: list[float] = []
        for number in range(1 + num_answers):
            matcher = grammars.matcher(Grammar.json_schema({**SCHEMA, "title": "new"}))  # which has not been used yet
            (later if number else first).extend(_places_s(matcher, tokens))
            constrained += _constraining_s(matcher, tokens, size) if number else []
        means = [1e6 * fmean(values) for values in (first, later, constrained)]
        yield MaskRow(size, 1e3 * (prepared - started), 1e3 * (compiled - prepared), *means)


def made_up_pieces(size: int) -> list[bytes]:
    """All bytes and, to be so many, short words with and without a space before them; the last piece is no text."""
    rng = random.Random(0)
    pieces = dict.fromkeys(bytes([byte]) for byte in range(256))
    while len(pieces) < size - 1:
        word = "".join(rng.choices(_LETTERS, k=rng.randint(2, 8)))
        pieces[(rng.choice(["", " ", '"', " "]) + word).encode()] = None
    return [*pieces, b""]


def _cut(matcher: Matcher, pieces: list[bytes]) -> list[int]:
    """The text as tokens, each the longest that fits."""
    ids, rest = {piece: id for id, piece in enumerate(pieces)}, _TEXT
    tokens: list[int] = []
    while rest:
        piece = next(rest[:length] for length in range(min(9, len(rest)), 0, -1) if rest[:length] in ids)
        assert matcher.allowed(tokens).tokens[ids[piece]]
        tokens.append(ids[piece])
        rest = rest[len(piece) :]
    return tokens


def _places_s(matcher: Matcher, tokens: list[int]) -> Iterator[float]:
    for length in range(len(tokens)):
        started = time.perf_counter()
        matcher.allowed(tokens[:length])
        yield time.perf_counter() - started


def _constraining_s(matcher: Matcher, tokens: list[int], vocab_size: int) -> Iterator[float]:
    matcher.allowed([])
    for length in range(1, len(tokens)):
        sequence = Sequence([0, *tokens[:length]], SamplingParams(), num_prompt_tokens=1, matcher=matcher)
        logits = torch.zeros(1, vocab_size)
        started = time.perf_counter()
        constrain(logits, [Scored(sequence, [], 1)], frozenset({vocab_size - 1}))
        yield time.perf_counter() - started
