"""What a target and a draft in different processes say to each other; knows neither bytes nor sockets.

Each round the target asks for drafts of all its sequences together, and gets one answer for each. An `Ask` carries the whole
sequence in effect, but says only what is new: the draft remembers the tokens before, and a length and a checksum tell both
sides that they mean the same. A draft that has forgotten them says so, and is told the whole again; so nothing that either
side forgets, repeats or loses can make the two disagree.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from specdecode.backends.backend import ModelBackend
from specdecode.decoding.sequence import Draft, SamplingParams
from specdecode.errors import SpecDecodeError

NOTHING_KNOWN = 0  # the checksum of no tokens


class ExchangeError(SpecDecodeError):
    """The other side did not answer, or not in time, or not as the protocol demands.

    Args:
        cause: one word for a metric: absent, late, gone, refused or garbled.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type["ExchangeError"], tuple[str, str]]:
        return type(self), (self.cause, str(self))


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
class Introduction:
    """What a draft must know of a sequence once.

    Attributes:
        id: names the sequence, also in the log.
        num_prompt_tokens: how many of its tokens were not generated.
        params: how the target samples, which q should resemble.
        seed: the seed of the sequence's random numbers.
    """

    id: str
    num_prompt_tokens: int
    params: SamplingParams
    seed: int


@dataclass(frozen=True)
class Ask:
    """One sequence to draft for.

    Attributes:
        number: of the sequence, within the session.
        num_known: how many tokens the draft is taken to know.
        checksum: of those tokens.
        added: int32 [n], the tokens after them.
        k: how many tokens are wanted.
        introduction: of a sequence that the draft is not taken to know.
    """

    number: int
    num_known: int
    checksum: int
    added: np.ndarray
    k: int
    introduction: Introduction | None = None


@dataclass(frozen=True)
class Answer:
    """What a draft says to one ask.

    Attributes:
        draft: the guess; None if the draft does not know the sequence, and must be told the whole.
        num_ahead: how many of its tokens had been drafted before they were asked for.
    """

    draft: Draft | None
    num_ahead: int = 0


@dataclass(frozen=True)
class Request:
    """All asks of a round.

    Attributes:
        round: counts the requests of a session, so that an answer which comes too late is told from the one that is due.
        patience_s: how long the target waits; the draft answers before that with what it has.
        asks: one for each sequence.
    """

    round: int
    patience_s: float
    asks: list[Ask]


@dataclass(frozen=True)
class Reply:
    """The answers of a round, in the order of the asks.

    Attributes:
        round: of the request.
        busy_s: what the draft model's work on it took, forward passes and sampling.
        answers: one for each ask.
    """

    round: int
    busy_s: float
    answers: list[Answer]


def checksum(tokens: np.ndarray, so_far: int = NOTHING_KNOWN) -> int:
    """The CRC-32 of int32 tokens, going on from that of the tokens before them."""
    return zlib.crc32(tokens.tobytes(), so_far)
