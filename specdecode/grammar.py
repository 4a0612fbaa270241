"""A grammar and a vocabulary in, the tokens that may come next out. Knows neither models nor drafts.

A token is allowed if its bytes can go on to a text of the grammar, whether or not a tokenizer would have cut the text there. So
a constrained model is the model itself, given that its text is one of the grammar's so far. The work is llguidance's.
"""

import functools
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, regex_to_lark

from specdecode.errors import RequestError
from specdecode.text import Tokenizer
from specdecode.vocabulary import Vocabulary

logger = logging.getLogger("specdecode.grammar")

# Between two marks of JSON: a space, or a new line and how far it is indented. A model could write nothing but space otherwise.
_WHITESPACE = r" |\n[ \t]{0,40}"
# Every token is allowed that can be completed, and not only those into which a tokenizer would cut what must come.
_ALL_TOKENS = '%llguidance {"no_forcing": true}\n'
_LIMITS = LLParserLimits(verbose_errors=False)
_NUM_COMPILED = 64  # grammars that are remembered for each vocabulary
_NUM_REMEMBERED = 64  # places of a text whose allowed tokens are remembered


@dataclass(frozen=True)
class Grammar:
    """Which texts an answer may be.

    Attributes:
        kind: what `text` is: a JSON schema, a regular expression that all of the answer matches, or a grammar in llguidance's
            dialect of Lark.
        text: the schema as JSON, the expression or the grammar.
        is_lenient: whether keywords of a schema that cannot be enforced are passed over; if not, they are an error.
        field: what messages call it.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    is_lenient: bool = False
    field: str = field(default="grammar", compare=False)

    @staticmethod
    def json_schema(schema: dict[str, Any] | bool, *, is_lenient: bool = False, field: str = "grammar") -> "Grammar":
        """JSON that a schema describes, its properties in the schema's order."""
        return Grammar("json_schema", json.dumps(schema), is_lenient, field)

    @staticmethod
    def json_object(field: str = "grammar") -> "Grammar":
        """Any JSON object."""
        return Grammar.json_schema({"type": "object"}, field=field)

    @staticmethod
    def choice(texts: Sequence[str], field: str = "grammar") -> "Grammar":
        """One of some texts."""
        return Grammar("lark", f"start: {' | '.join(json.dumps(text, ensure_ascii=False) for text in texts)}", field=field)

    @property
    def source(self) -> str:
        """The grammar as llguidance takes it.

        Raises:
            RequestError: the text is no JSON schema.
        """
        if self.kind == "lark":
            body = self.text
        elif self.kind == "regex":
            body = f"start: /{regex_to_lark(self.text)}/" if self.text else 'start: ""'
        else:
            body = f"start: %json {json.dumps(self._schema())}"
        return LLMatcher.grammar_from_lark(_ALL_TOKENS + body)

    def _schema(self) -> dict[str, Any]:
        try:
            schema = json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{self.field}: expected a JSON schema: {error}", self.field) from error
        if not isinstance(schema, dict | bool):
            raise RequestError(f"{self.field}: expected a JSON schema, got {type(schema).__name__}", self.field)
        options = {"whitespace_pattern": _WHITESPACE, "lenient": self.is_lenient}
        return {**(schema if isinstance(schema, dict) else {} if schema else {"not": {}}), "x-guidance": options}


@dataclass(frozen=True)
class Allowed:
    """What may follow a text.

    Attributes:
        tokens: bool [vocab], the tokens of text that may come next.
        may_end: whether the text may end here.
    """

    tokens: np.ndarray
    may_end: bool

    @functools.cached_property
    def is_over(self) -> bool:
        """Whether nothing can follow: the text is whole, or, if it may not end here, cannot be completed."""
        return not self.tokens.any()


class Grammars:
    """Compiles grammars for one vocabulary, and remembers the last ones.

    Args:
        pieces: the bytes of each token; none for one that is no text.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.is_text = np.array([bool(piece) for piece in pieces])
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Pieces(pieces)))
        self._compiled = functools.lru_cache(_NUM_COMPILED)(self._compile)

    @staticmethod
    @functools.lru_cache(4)
    def of(name: str, vocab_size: int, eos_token_ids: frozenset[int]) -> "Grammars":
        """Those of a model, by its name; its end tokens are no text.

        Raises:
            ModelError: its tokenizer cannot be opened or is of no kind that is known here.
        """
        pieces = Vocabulary(Tokenizer(name), vocab_size).pieces
        return Grammars([b"" if id in eos_token_ids else pieces.get(id, b"") for id in range(vocab_size)])

    def matcher(self, grammar: Grammar) -> "Matcher":
        """Makes a matcher for one answer.

        Raises:
            RequestError: the grammar cannot be read, is too large, or allows no text.
        """
        matcher = Matcher(self._compiled(grammar), self.is_text)
        if matcher.allowed([]).is_over:
            raise RequestError(f"{grammar.field}: expected a grammar of some text, got one that allows none", grammar.field)
        return matcher

    def _compile(self, grammar: Grammar) -> LLMatcher:
        compiled = LLMatcher(self._tokenizer, grammar.source, log_level=0, limits=_LIMITS)
        if compiled.is_error():
            raise RequestError(f"{grammar.field}: {_first_line(compiled.get_error())}", grammar.field)
        return compiled


class Matcher:
    """Follows one answer through a grammar: a function of the answer's tokens, that remembers where it was asked last.

    Args:
        start: the grammar before the first token.
        is_text: bool [vocab], which tokens are text.
    """

    def __init__(self, start: LLMatcher, is_text: np.ndarray) -> None:
        self.is_text = is_text
        self._start = start
        self._matcher = start.deep_copy()
        self._path: list[int] = []  # the tokens that the matcher has taken
        self._found: dict[int, Allowed] = {}  # after so many of them

    def allowed(self, tokens: list[int]) -> Allowed:
        """What may follow the answer's first tokens; nothing where they are no beginning of a text of the grammar."""
        common = _common_length(self._path, tokens)
        if common == len(tokens) and common in self._found:
            return self._found[common]
        self._go_back(common)
        if not self._go_on(tokens[common:]):
            return self._nothing()
        found = self._found[len(tokens)] = self._compute()
        while len(self._found) > _NUM_REMEMBERED:
            del self._found[min(self._found)]
        return found

    def _go_back(self, length: int) -> None:
        if length < len(self._path) and not self._matcher.rollback(len(self._path) - length):
            self._begin_again()
            length = 0
        del self._path[length:]
        self._found = {place: found for place, found in self._found.items() if place <= length}

    def _go_on(self, tokens: list[int]) -> bool:
        """Takes tokens as far as the grammar allows them; returns whether it allows all."""
        num_taken = self._matcher.try_consume_tokens(tokens) if all(self.is_text[token] for token in tokens) else 0
        self._path += tokens[:num_taken]
        return num_taken == len(tokens)

    def _compute(self) -> Allowed:
        bits = np.zeros(len(self.is_text) // 32 + 1, dtype=np.int32)  # with one for the end of the answer
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            logger.warning(
                "a grammar cannot go on after tokens=%d: %s", len(self._path), _first_line(self._matcher.get_error())
            )
            self._begin_again()
            return self._nothing()
        mask = np.unpackbits(bits.view(np.uint8), count=len(self.is_text) + 1, bitorder="little").view(bool)
        return Allowed(mask[:-1], bool(mask[-1]))

    def _begin_again(self) -> None:
        """Leaves a state out of which llguidance knows no other way."""
        self._matcher, self._path, self._found = self._start.deep_copy(), [], {}

    def _nothing(self) -> Allowed:
        return Allowed(np.zeros(len(self.is_text), dtype=bool), False)


class _Pieces:
    """A vocabulary as llguidance takes it, with a token for the end of the answer behind all others."""

    bos_token_id = None

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.tokens = [*pieces, b"\xff<|end of the answer|>"]  # 0xff begins what is no text
        self.eos_token_id = len(pieces)
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, text: str | bytes) -> list[int]:  # noqa: ARG002  llguidance tries it once
        """Cuts a text into tokens, which is not asked for where all tokens are allowed."""
        return []


def _common_length(one: list[int], other: list[int]) -> int:
    """How many tokens two beginnings share."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(place for place in range(length) if one[place] != other[place])


def _first_line(message: str) -> str:
    """An error of llguidance without the place in what it was given, which is not what a user wrote."""
    return re.sub(r"^(at )?\d+\(\d+\): ", "", " ".join(message.split("\n   1 |")[0].split()))[:300]
