"""A target and a draft that are tables, sequences with every kind of sampling parameter, and ways to bring them together."""

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from specdecode.backends.backend import ModelBackend
from specdecode.backends.table import TableModel, random_table
from specdecode.decoding.drafters import Drafter, ModelDrafter
from specdecode.decoding.loop import generate
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.exchange.channel import InProcessChannel
from specdecode.exchange.messages import ModelTokens
from specdecode.exchange.remote import RemoteDrafter
from specdecode.exchange.scheduler import DraftScheduler, SchedulerConfig, SchedulerMetrics

VOCAB_SIZE, EOS = 7, 6
_TARGETS, _OTHERS = (random_table(VOCAB_SIZE, seed, sharpness=1.5) for seed in (0, 1))


def _nearly(tokens: tuple[int, ...]) -> torch.Tensor:
    return 0.7 * _TARGETS(tokens) + 0.3 * _OTHERS(tokens)


TARGET = TableModel(cache(_TARGETS), eos_token_ids=[EOS])
DRAFT = TableModel(cache(_nearly), eos_token_ids=[EOS])
TOKENS = ModelTokens.of(TARGET)

GREEDY: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": -0.3},
    {"logit_bias": {1: 2.0, 2: -3.5}, "min_tokens": 9},
    {"bad_words_ids": ((1,), (2, 3)), "stop_token_ids": frozenset({4})},
]
SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 3, "min_p": 0.05},
    {"temperature": 0.9, "repetition_penalty": 1.4, "frequency_penalty": -0.5, "presence_penalty": 1.0},
    {"temperature": 0.7, "logit_bias": {0: 1.5, 5: -2.0}, "allowed_token_ids": frozenset({0, 1, 3, 5, 6})},
    {"temperature": 1.0, "bad_words_ids": ((2,), (1, 0)), "min_tokens": 8},
    {"temperature": 1.0, "ignore_eos": True, "stop_token_ids": frozenset({5})},
    {"temperature": 0.8, "verifier": "block"},
    {"temperature": 1.1, "verifier": "block", "top_k": 4, "repetition_penalty": 0.8},
]
COUPLED: list[dict[str, Any]] = [
    {"temperature": 1.0, "verifier": "coupled"},
    {"temperature": 0.7, "verifier": "coupled", "top_p": 0.9, "presence_penalty": 0.5},
]


def varied(kinds: list[dict[str, Any]], *, count: int = 1, k: int = 4, max_tokens: int = 24) -> list[Sequence]:
    """`count` sequences of each kind, the same ones every time."""
    rng = random.Random(0)
    return [
        Sequence(
            [rng.randrange(VOCAB_SIZE - 1) for _ in range(rng.randint(1, 9))],
            SamplingParams(**{"max_tokens": max_tokens, "seed": rng.randrange(2**64), **kind}),
            Route("draft", k),
        )
        for kind in kinds
        for _ in range(count)
    ]


def plain(tokens: list[int], k: int = 4, **params: Any) -> Sequence:
    """One sequence that does not end before its time."""
    settings = {"max_tokens": 100, "seed": 0, "ignore_eos": True, **params}
    return Sequence(tokens, SamplingParams(**settings), Route("draft", k))


def scheduler(draft: ModelBackend = DRAFT, *, support: int = 64, min_confidence: float = 0.0, **config: Any) -> DraftScheduler:
    """A scheduler for one draft model."""

    def drafter_for(target: ModelTokens) -> ModelDrafter:
        eos = target.eos_token_ids
        return ModelDrafter(draft, eos_token_ids=eos, support=support, min_confidence=min_confidence)

    return DraftScheduler(drafter_for, SchedulerConfig(**config))


def connected(
    schedule: DraftScheduler, disturb: Callable[[bytes], list[bytes]] | None = None, *, target: ModelBackend = TARGET
) -> tuple[RemoteDrafter, InProcessChannel]:
    """A remote drafter over a channel in this process."""
    tokens = ModelTokens.of(target)
    channel = InProcessChannel(schedule, tokens, disturb) if disturb else InProcessChannel(schedule, tokens)
    drafter = RemoteDrafter("test", target.vocab_size, deadline_s=60.0)
    drafter.connect(channel)
    return drafter, channel


class Working:
    """A drafter beside whose rounds the draft's scheduler does steps, as it would meanwhile in a process of its own.

    Args:
        drafter: over the channel.
        channel: the scheduler's.
        num_steps: how many steps come before each round.
    """

    def __init__(self, drafter: Drafter, channel: InProcessChannel, num_steps: Iterator[int]) -> None:
        self.drafter = drafter
        self.channel = channel
        self._num_steps = num_steps

    @property
    def metrics(self) -> SchedulerMetrics:
        return self.channel.scheduler.metrics

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        for _ in range(next(self._num_steps)):
            self.channel.work()
        return self.drafter.propose(sequences)


class Expecting:
    """A drafter that compares what it drafts with what a drafter here makes of each sequence.

    Args:
        tolerance: of q; bit for bit if it is 0.
    """

    def __init__(self, drafter: Drafter, here: ModelDrafter, tolerance: float = 0.0) -> None:
        self._drafter = drafter
        self._here = here
        self._tolerance = tolerance
        self.num_compared = 0

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        there = self._drafter.propose(sequences)
        for one, other in zip(self._here.propose(sequences), there, strict=True):
            assert_same(one, other, self._tolerance)
            self.num_compared += bool(one.tokens)
        return there


def assert_same(here: Draft, there: Draft, tolerance: float = 0.0) -> None:
    """Tokens, support and q; a q of one token is 1 and has no more to say."""
    assert there.tokens == here.tokens
    q = here.q.to(there.q.dtype) if here.q.shape[1] == 1 else here.q
    torch.testing.assert_close(there.q, q, atol=tolerance, rtol=0)
    if not tolerance:
        assert torch.equal(there.support, here.support)


def decode(sequences: list[Sequence], drafter: Drafter, target: ModelBackend = TARGET) -> list[list[int]]:
    """The tokens of all sequences, decoded together with the lengths of their routes."""
    for _ in generate(sequences, drafter, target):
        pass
    return [sequence.tokens for sequence in sequences]
