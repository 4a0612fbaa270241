"""Rounds of ids in, pieces of text out. Knows no request and no target."""

from collections.abc import Sequence as Several
from dataclasses import dataclass, field, replace

from serve.logprobs import ShownToken
from specdecode.decoding.sequence import FinishReason, Round, TokenLogprob
from specdecode.text import StopStrings, Tokenizer


@dataclass(frozen=True)
class Wording:
    """What a request wants of its answers' text.

    Attributes:
        stop: strings before which the text ends.
        min_tokens: no stop string is looked for in so many tokens.
        echo: the prompt's text, to stand in front; None if it does not.
        is_echo_only: whether what is generated is dropped.
    """

    stop: list[str] = field(default_factory=list)
    min_tokens: int = 0
    echo: str | None = None
    is_echo_only: bool = False


@dataclass(frozen=True)
class Piece:
    """What one round added to a text.

    Attributes:
        text: the part of the text that became certain.
        accepted_text: its beginning, which was drafted.
        tokens: those whose text began in what is certain by now, and in no piece before.
        finish_reason: set in the last piece.
        round: the round, without what comes after the end of the text.
    """

    text: str
    accepted_text: str
    tokens: list[ShownToken]
    finish_reason: FinishReason | None
    round: Round


class Transcript:
    """The text of one generation, as it grows.

    Args:
        tokenizer: turns ids into text.
        wording: what the text is to be.
    """

    def __init__(self, tokenizer: Tokenizer, wording: Wording) -> None:
        self.text = ""
        self.tokens: list[ShownToken] = []
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._wording = wording
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopStrings(wording.stop)
        self._num_tokens = 0
        self._offset = 0  # where the next token's text begins
        self._held: list[ShownToken] = []  # tokens whose text is not certain yet

    def echo(self, prompt: list[int], logprobs: list[TokenLogprob] | None) -> Piece:
        """The prompt as the first piece; comes before every round."""
        detokenizer = self._tokenizer.detokenizer()
        tokens, offset = [], 0
        for token, logprob in zip(prompt, [None, *_each(prompt[1:], logprobs)], strict=True):
            tokens.append(ShownToken(token, offset, logprob))
            offset += len(detokenizer.decode([token]))
        self.text = self._wording.echo or ""
        self.tokens += tokens
        self._offset = len(self.text)
        return Piece(self.text, "", tokens, None, Round([], 0, 0, None, 0.0, 0.0))

    def add(self, round: Round) -> Piece:
        """Takes the next round."""
        if self._wording.is_echo_only:
            round = _cut(round, 0, "length")
        texts: list[str] = []
        for token, logprob in zip(round.tokens, _each(round.tokens, round.logprobs), strict=True):
            texts.append(self._next(token, logprob))
            if self._stops.is_stopped:
                round = _cut(round, len(texts), "stop")
                break
        if round.finish_reason is not None and not self._stops.is_stopped:
            texts.append(self._stops.feed(self._detokenizer.flush()) + self._stops.flush())
        text = "".join(texts)
        self.text += text
        self.finish_reason = round.finish_reason
        return Piece(text, "".join(texts[: round.num_accepted]), self._release(), self.finish_reason, round)

    def _next(self, token: int, logprob: TokenLogprob | None) -> str:
        """Decodes one token; returns the text that is certain not to belong to a stop string."""
        self._held.append(ShownToken(token, self._offset, logprob))
        text = self._detokenizer.decode([token])
        self._offset += len(text)
        self._num_tokens += 1
        return text if self._num_tokens <= self._wording.min_tokens else self._stops.feed(text)

    def _release(self) -> list[ShownToken]:
        """The held tokens that now may be shown: what a stop string cuts off never may."""
        is_whole = self.finish_reason is not None and not self._stops.is_stopped
        released = [shown for shown in self._held if is_whole or shown.offset < len(self.text)]
        self._held = self._held[len(released) :]
        self.tokens += released
        return released


def _each(tokens: list[int], logprobs: list[TokenLogprob] | None) -> Several[TokenLogprob | None]:
    return [None] * len(tokens) if logprobs is None else logprobs


def _cut(round: Round, length: int, finish_reason: FinishReason) -> Round:
    """Ends a generation after the first `length` tokens of a round."""
    return replace(
        round,
        tokens=round.tokens[:length],
        num_accepted=min(round.num_accepted, length),
        finish_reason=finish_reason,
        logprobs=round.logprobs and round.logprobs[:length],
    )
