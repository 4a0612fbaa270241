"""Log-probabilities of token ids in, the bodies that OpenAI and vLLM show them in out."""

from dataclasses import dataclass
from typing import Any

from specdecode.decoding.sequence import TokenLogprob
from specdecode.errors import ModelError
from specdecode.text import Tokenizer
from specdecode.vocabulary import Vocabulary

_LEAST = -9999.0  # JSON has no infinity; the same number as vLLM's


@dataclass(frozen=True)
class ShownToken:
    """A token of an answer.

    Attributes:
        token: its id.
        offset: where in the answer's text its own text begins, in characters.
        logprob: how likely it was; None for a prompt's first token, and where nobody asked.
    """

    token: int
    offset: int
    logprob: TokenLogprob | None


class TokenNames:
    """What each token is called when it stands alone.

    Args:
        tokenizer: the target's.
        vocab_size: how many tokens the target has.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        try:
            vocabulary = Vocabulary(tokenizer, vocab_size)
        except ModelError:  # a kind of tokenizer whose bytes are not known
            self._bytes: dict[int, bytes] = {}
        else:
            self._bytes = vocabulary.pieces | {id: name.encode() for id, name in vocabulary.special.items()}

    def spelling(self, token: int) -> bytes:
        """The bytes that the token stands for, where the tokenizer can tell them; else those of its text."""
        return self._bytes[token] if token in self._bytes else self._tokenizer.decode([token]).encode()

    def text(self, token: int) -> str:
        """The token as text; what is no whole character is U+FFFD, a special token is its name."""
        return self.spelling(token).decode(errors="replace")


def completion_logprobs(tokens: list[ShownToken], num_top: int, names: TokenNames) -> dict[str, Any]:
    """The `logprobs` of a completion's choice; its `top_logprobs` hold the token itself too, as OpenAI's do."""
    return {
        "tokens": [names.text(shown.token) for shown in tokens],
        "token_logprobs": [shown.logprob and _finite(shown.logprob.logprob) for shown in tokens],
        "top_logprobs": [shown.logprob and _by_text(shown.logprob, num_top, names) for shown in tokens],
        "text_offset": [shown.offset for shown in tokens],
    }


def chat_logprobs(tokens: list[ShownToken], num_top: int, names: TokenNames) -> dict[str, Any]:
    """The `logprobs` of a chat's choice."""
    return {"content": [_chat_token(shown.logprob, num_top, names) for shown in tokens if shown.logprob]}


def prompt_logprobs(logprobs: list[TokenLogprob], num_top: int, names: TokenNames) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: nothing for the first token, then the token itself and the most likely ones, by their ids."""
    return [None, *(_by_id(logprob, num_top, names) for logprob in logprobs)]


def _by_text(logprob: TokenLogprob, num_top: int, names: TokenNames) -> dict[str, float]:
    ranked = {logprob.token: logprob.logprob} | dict(logprob.top[:num_top])
    by_text: dict[str, float] = {}
    for token, value in ranked.items():
        by_text.setdefault(names.text(token), _finite(value))  # of tokens that look the same, the likeliest
    return by_text


def _chat_token(logprob: TokenLogprob, num_top: int, names: TokenNames) -> dict[str, Any]:
    top = [_named(token, value, names) for token, value in logprob.top[:num_top]]
    return {**_named(logprob.token, logprob.logprob, names), "top_logprobs": top}


def _named(token: int, value: float, names: TokenNames) -> dict[str, Any]:
    return {"token": names.text(token), "logprob": _finite(value), "bytes": list(names.spelling(token))}


def _by_id(logprob: TokenLogprob, num_top: int, names: TokenNames) -> dict[str, Any]:
    top = {token: (value, rank) for rank, (token, value) in enumerate(logprob.top[:num_top], start=1)}
    own = (logprob.logprob, logprob.rank)
    return {
        str(token): {"logprob": _finite(value), "rank": rank, "decoded_token": names.text(token)}
        for token, (value, rank) in ({logprob.token: own} | top | {logprob.token: own}).items()
    }


def _finite(value: float) -> float:
    return max(value, _LEAST)
