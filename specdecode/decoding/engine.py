"""Continuous batching: sequences join and leave between rounds. admit -> prefill -> step -> stream."""

from collections import deque
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from specdecode.backends.backend import ModelBackend
from specdecode.config import StrictModel
from specdecode.decoding.control import AdaptiveLength, FixedLength, LengthPolicy
from specdecode.decoding.drafters import Drafter
from specdecode.decoding.loop import check_sequence, prefill, step
from specdecode.decoding.sequence import Round, Sequence
from specdecode.errors import OverloadedError


class EngineConfig(StrictModel):
    """How much an engine takes on at a time."""

    max_batch: int = Field(default=16, gt=0, description="how many sequences are decoded together at the most")
    max_queued: int = Field(default=256, ge=0, description="how many sequences wait for a place at the most")
    draft_length: Literal["adaptive", "fixed"] = Field(
        default="adaptive", description="how many tokens are drafted: at the most k, as many as pay, or always k"
    )
    prefill_chunk: int = Field(default=256, gt=0, description="how many prompt tokens are computed between two rounds")


class Engine:
    """Decodes sequences as they come. Not thread-safe: one thread calls all of it.

    Args:
        target: the model whose output it is; it remembers more rows than `config.max_batch`.
        drafter: whoever guesses.
        config: the limits.
    """

    def __init__(
        self,
        target: ModelBackend,
        drafter: Drafter,
        config: EngineConfig | None = None,
    ) -> None:
        self.target = target
        self.config = config or EngineConfig()
        self._drafter = drafter
        self._length: LengthPolicy = AdaptiveLength() if self.config.draft_length == "adaptive" else FixedLength()
        self._queued: deque[Sequence] = deque()
        self._prefilling: deque[tuple[Sequence, int]] = deque()  # with the number of tokens that are computed
        self._decoding: list[Sequence] = []

    @property
    def num_queued(self) -> int:
        """How many sequences wait for a place."""
        return len(self._queued)

    @property
    def num_running(self) -> int:
        """How many sequences have a place."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have a place."""
        return [sequence for sequence, _ in self._prefilling] + self._decoding

    @property
    def has_work(self) -> bool:
        """Whether there is anything to decode."""
        return bool(self._queued or self._prefilling or self._decoding)

    def submit(self, sequence: Sequence) -> None:
        """Takes a sequence on; it starts when there is a place.

        Raises:
            RequestError: it does not fit the target's context.
            OverloadedError: the queue is full.
        """
        check_sequence(sequence, self.target)
        if self.num_queued + self.num_running >= self.config.max_queued + self.config.max_batch:
            raise OverloadedError(f"{len(self._queued)} requests are waiting already: try again later")
        self._queued.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Drops a sequence wherever it is; one that is finished or unknown is ignored."""
        self._queued = deque(queued for queued in self._queued if queued is not sequence)
        self._prefilling = deque(pair for pair in self._prefilling if pair[0] is not sequence)
        self._decoding = [decoding for decoding in self._decoding if decoding is not sequence]

    def cancel_all(self) -> None:
        """Drops everything."""
        self._queued.clear()
        self._prefilling.clear()
        self._decoding.clear()

    def step(self) -> list[tuple[Sequence, Round]]:
        """Admits what fits, computes one chunk of a waiting prompt, and advances all that decode by one round."""
        self._admit()
        self._prefill()
        if not self._decoding:
            return []
        batch = self._decoding
        self._length.plan(batch)
        rounds = step(batch, self._drafter, self.target)
        self._length.observe(batch, rounds)
        self._decoding = [sequence for sequence in batch if sequence.finish_reason is None]
        return list(zip(batch, rounds, strict=True))

    def run(self) -> Iterator[tuple[Sequence, Round]]:
        """Steps until nothing is left to decode."""
        while self.has_work:
            yield from self.step()

    def _admit(self) -> None:
        while self._queued and self.num_running < self.config.max_batch:
            self._prefilling.append((self._queued.popleft(), 0))

    def _prefill(self) -> None:
        """Moves prompts on, oldest first, until one chunk's worth of tokens is computed."""
        budget = self.config.prefill_chunk
        while self._prefilling and budget > 0:
            sequence, start = self._prefilling.popleft()
            if start == 0 and sequence.params.prompt_logprobs is None:
                start = sequence.num_cached = min(self.target.num_remembered(sequence.tokens), len(sequence.tokens) - 1)
            end = min(start + budget, len(sequence.tokens) - 1)  # a round scores the last token
            if end:  # where all of it is remembered this takes the row
                prefill(sequence, self.target, start, end)
            budget -= end - start
            if end == len(sequence.tokens) - 1:
                self._decoding.append(sequence)
            else:
                self._prefilling.appendleft((sequence, end))
