"""What target and draft say to each other each round: sequences one way, guesses the other.

A `Channel` carries the words; `RemoteDrafter` makes a `Drafter` of it, which fails by guessing nothing.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from ray.serve.handle import DeploymentHandle

from specdecode.backends.backend import ModelBackend
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ModelTokens:
    """A model as far as its tokens go, which is all that a draft must know of its target.

    Attributes:
        name: the model, which is where its tokenizer is found.
        vocabulary_id: a digest of what each token id means.
        vocab_size: the width of its logits.
        eos_token_ids: tokens that end a generation.
    """

    name: str
    vocabulary_id: str
    vocab_size: int
    eos_token_ids: frozenset[int] = frozenset()

    @staticmethod
    def of(backend: ModelBackend) -> "ModelTokens":
        """Those of an open model."""
        return ModelTokens(backend.name, backend.vocabulary_id, backend.vocab_size, backend.eos_token_ids)


@dataclass(frozen=True)
class Ask:
    """One sequence to draft for.

    Attributes:
        id: names the sequence; a draft that remembers it computes only what is new.
        tokens: int32 [n], the whole sequence.
        num_prompt_tokens: how many of them were not generated.
        k: how many tokens are wanted.
        params: how the target samples, which q should resemble.
        seed: the seed of the sequence's random numbers.
    """

    id: str
    tokens: np.ndarray
    num_prompt_tokens: int
    k: int
    params: SamplingParams
    seed: int

    @staticmethod
    def of(sequence: Sequence) -> "Ask":
        """Puts what a draft must know of a sequence into words."""
        tokens = np.array(sequence.tokens, dtype=np.int32)
        return Ask(sequence.id, tokens, sequence.num_prompt_tokens, sequence.num_wanted, sequence.params, sequence.seed)

    def sequence(self) -> Sequence:
        """The sequence as the draft sees it."""
        sequence = Sequence(
            self.tokens.tolist(), self.params, Route(k=self.k), id=self.id, num_prompt_tokens=self.num_prompt_tokens
        )
        sequence.seed = self.seed  # drawn at random where the request names none
        return sequence


@dataclass(frozen=True)
class Guess:
    """A draft in plain arrays: tokens [k], support [k, m] and q [k, m]."""

    tokens: np.ndarray
    support: np.ndarray
    q: np.ndarray

    @staticmethod
    def of(draft: Draft) -> "Guess":
        """Puts a draft into words."""
        return Guess(np.array(draft.tokens, dtype=np.int32), draft.support.int().numpy(), draft.q.numpy())

    def draft(self) -> Draft:
        """The draft as the target sees it."""
        # Arrays that come from another process are read-only, which torch does not like.
        return Draft(self.tokens.tolist(), torch.from_numpy(self.support.astype(np.int64)), torch.from_numpy(self.q.copy()))


class Channel(Protocol):
    """A way to a draft."""

    async def propose(self, asks: list[Ask], target: ModelTokens) -> list[Guess]:
        """Asks for drafts in the target's tokens; raises whatever goes wrong."""
        ...


class HandleChannel:
    """A channel that is a Ray Serve handle: every round is a call, routed by Serve."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._propose = handle.options(method_name="propose")

    async def propose(self, asks: list[Ask], target: ModelTokens) -> list[Guess]:
        """See `Channel.propose`."""
        return await self._propose.remote(asks, target)


class RemoteDrafter:
    """A `Drafter` at the other end of a channel. A draft that is late, gone or broken costs speed, never a request.

    Args:
        name: what the draft is called in the log.
        channel: the way to it.
        target: the model that is drafted for.
        loop: the event loop that the channel lives on; `propose` is called from another thread.
        deadline_s: an answer that takes longer is not waited for.
        retry_after_s: how long nothing is asked after a failure.
    """

    def __init__(
        self,
        name: str,
        channel: Channel,
        target: ModelTokens,
        loop: asyncio.AbstractEventLoop,
        *,
        deadline_s: float,
        retry_after_s: float,
    ) -> None:
        self._name = name
        self._channel = channel
        self._target = target
        self._loop = loop
        self._deadline_s = deadline_s
        self._retry_after_s = retry_after_s
        self._silent_until = 0.0
        self.num_failures = 0

    def propose(self, sequences: list[Sequence]) -> list[Draft]:
        """See `Drafter.propose`; empty drafts if the draft does not answer."""
        if time.monotonic() < self._silent_until:
            return [Draft.empty() for _ in sequences]
        asks = [Ask.of(sequence) for sequence in sequences]
        answer = asyncio.run_coroutine_threadsafe(self._ask(asks), self._loop)
        try:
            return [guess.draft() for guess in answer.result()]
        except Exception as error:  # whatever is wrong with a draft, the target goes on without it
            self.num_failures += 1
            self._silent_until = time.monotonic() + self._retry_after_s
            logger.warning("draft %s gave no answer, decoding without it: %r", self._name, error)
            return [Draft.empty() for _ in sequences]

    async def _ask(self, asks: list[Ask]) -> list[Guess]:
        return await asyncio.wait_for(self._channel.propose(asks, self._target), self._deadline_s)
