"""What a model is asked to generate, and what streams back: ids alone. Knows no model and no HTTP."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from serve.trial import try_grammar
from serve.worker import EngineThread
from specdecode.decoding.constraints import bind_grammar
from specdecode.decoding.sequence import Round, Route, SamplingParams, Sequence, TokenLogprob

# An item of a stream must stay far below the 4 MiB that gRPC takes; this many tokens' log-probabilities are about 0.5 MiB.
_MAX_PROMPT_LOGPROBS = 1024


@dataclass(frozen=True)
class Generation:
    """What a target is asked to do.

    Attributes:
        tokens: the prompt, and what was generated of the answer already.
        params: how to sample.
        route: which draft guesses.
        model: the draft that is asked to answer by itself; None for the target.
        id: names the generation in the log.
        num_prompt_tokens: how many of `tokens` are the prompt; 0 for all.
        seed: for the random numbers, where `params` leave it open. Not in `params`: a seed there is a promise of the same
            answer again, for which drafts keep their full length.
    """

    tokens: list[int]
    params: SamplingParams
    route: Route
    model: str | None = None
    id: str = ""
    num_prompt_tokens: int = 0
    seed: int | None = None

    def sequence(self) -> Sequence:
        """The sequence to decode; its id is unique, whoever uses the generation's id again."""
        id = f"{self.id}/{secrets.token_hex(4)}"
        sequence = Sequence(self.tokens, self.params, self.route, id=id, num_prompt_tokens=self.num_prompt_tokens)
        if self.params.seed is None and self.seed is not None:
            sequence.seed = self.seed
        return sequence

    def continued(self, tokens: list[int], *, has_prompt_logprobs: bool) -> "Generation":
        """The same after some of it is done: `tokens` were generated, and the prompt's log-probabilities perhaps reported."""
        if not tokens:
            return self
        params = replace(self.params, prompt_logprobs=None) if has_prompt_logprobs else self.params
        num_prompt_tokens = self.num_prompt_tokens or len(self.tokens)
        return replace(self, tokens=self.tokens + tokens, params=params, num_prompt_tokens=num_prompt_tokens)


@dataclass(frozen=True)
class Admission:
    """The first item of a stream: the engine of this replica has taken the generation on."""

    replica_id: str


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of the next of a prompt's tokens; those of the first round come before it, in parts."""

    values: list[TokenLogprob]


Item = Admission | PromptLogprobs | list[Round]


@dataclass(frozen=True)
class TargetInfo:
    """What the router must know of a model."""

    max_length: int
    vocab_size: int


async def answer(worker: EngineThread, generation: Generation, replica_id: str) -> AsyncGenerator[Item, None]:
    """Streams one generation: an `Admission`, then all rounds that are ready at a time; to stop listening cancels it.

    Raises:
        RequestError: the prompt does not fit, or the grammar cannot be used.
        OverloadedError: the queue is full.
    """
    sequence = generation.sequence()
    if sequence.params.grammar is not None:  # compiled neither on the event loop nor on the engine's thread
        await asyncio.to_thread(try_grammar, sequence.params.grammar)
        await asyncio.to_thread(bind_grammar, sequence, worker.target)
    async with aclosing(worker.stream(sequence)) as stream:
        async for rounds in stream:
            if not rounds:
                yield Admission(replica_id)
                continue
            for part in _prompt_logprobs(rounds[0]):
                yield part
            yield [replace(rounds[0], prompt_logprobs=None), *rounds[1:]]


def _prompt_logprobs(round: Round) -> Iterator[PromptLogprobs]:
    """A round's log-probabilities of the prompt, in parts."""
    values = round.prompt_logprobs
    if values is not None:
        for start in range(0, max(1, len(values)), _MAX_PROMPT_LOGPROBS):
            yield PromptLogprobs(values[start : start + _MAX_PROMPT_LOGPROBS])
