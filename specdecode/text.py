"""Text to token ids and back: all that knows a tokenizer. Knows no model."""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from typing import Any, Protocol

from transformers import AutoTokenizer

from specdecode.embedded import resolve_model
from specdecode.errors import ModelError, RequestError

_INCOMPLETE = "\ufffd"  # what a tokenizer makes of bytes that are not a whole character


class HasVocabulary(Protocol):
    """A model, or its tokenizer, whose token ids mean something; the same as another's exactly if `vocabulary_id` is equal."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def vocabulary_id(self) -> str:
        """A digest of what each token id means."""
        ...


class Tokenizer:
    """A model's tokenizer and chat template.

    Args:
        name_or_path: a Hugging Face name, a checkpoint folder, or an embedded model such as tiny/target.

    Raises:
        ModelError: there is no tokenizer of that name.
    """

    def __init__(self, name_or_path: str) -> None:
        self.name = name_or_path
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(resolve_model(name_or_path))
        except (OSError, ValueError) as error:
            raise ModelError(f"tokenizer of {name_or_path!r} cannot be loaded: {' '.join(str(error).split())[:300]}") from error

    @cached_property
    def vocabulary_id(self) -> str:
        """A digest of the vocabulary."""
        return hashlib.sha256(json.dumps(sorted(self._tokenizer.get_vocab().items())).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Turns a raw prompt into ids, with the special tokens that the model expects around it."""
        return self._tokenizer(text)["input_ids"]

    def encode_part(self, text: str) -> list[int]:
        """Turns a part of a text into ids, with nothing around it."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def spellings(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Turns texts into ids, each as it is at a text's start and as it is after a space, as vLLM does with its bad words."""
        spelled = (self.encode_part(space + text.lstrip(" ")) for text in texts for space in ("", " "))
        return [tuple(ids) for ids in dict.fromkeys(map(tuple, spelled)) if ids]

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Turns messages, each with a role and a content, into the ids of a prompt for the assistant's answer.

        Raises:
            RequestError: the model has no chat template, or its template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise RequestError(f"messages: model {self.name!r} has no chat template", param="messages")
        try:
            encoded = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        except Exception as error:  # a template is a program of its own and raises what it likes
            raise RequestError(f"messages: {' '.join(str(error).split())}", param="messages") from error
        return encoded["input_ids"]

    def has_role(self, role: str) -> bool:
        """Whether the chat template names a role, as one does that treats it in a way of its own."""
        return re.search(rf"""["']{role}["']""", str(self._tokenizer.chat_template)) is not None

    def decode(self, tokens: Sequence[int]) -> str:
        """Turns ids into text, without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token, as the tokenizer writes tokens down."""
        return self._tokenizer.get_vocab()

    @property
    def added_ids(self) -> frozenset[int]:
        """Tokens that are found in a text before the tokenizer's model sees it."""
        return frozenset(self._tokenizer.added_tokens_decoder)

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are no text."""
        added = self._tokenizer.added_tokens_decoder
        return frozenset(id for id in added if added[id].special) | frozenset(self._tokenizer.all_special_ids)

    @property
    def start_ids(self) -> list[int]:
        """Special tokens that `encode` puts before every text."""
        encoded = self._tokenizer("x", return_special_tokens_mask=True)
        pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
        return [token for token, _ in takewhile(lambda pair: pair[1], pairs)]

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, if there is one."""
        return self._tokenizer.eos_token_id

    @property
    def decoder_steps(self) -> list[dict[str, Any]]:
        """The steps that turn tokens into text, in the words of the tokenizers library; none if it does not describe them."""
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        step = {} if decoder is None else json.loads(decoder.__getstate__())
        return step.get("decoders", [step] if step else [])

    @property
    def affixes(self) -> list[str]:
        """Marks of a word's end, or of a token inside a word, that the tokenizer's model knows."""
        model = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "model", None)
        return [mark for name in ("continuing_subword_prefix", "end_of_word_suffix") if (mark := getattr(model, name, None))]

    def split(self, written: str) -> list[int]:
        """Turns a text, written as the tokens are, into ids by the tokenizer's model alone."""
        return [token.id for token in self._tokenizer.backend_tokenizer.model.tokenize(written)]

    def detokenizer(self) -> "Detokenizer":
        """Starts decoding one stream of ids."""
        return Detokenizer(self)


class Detokenizer:
    """Decodes a stream of ids piece by piece: never half a character, and all pieces together are the whole text.

    A window of earlier ids is decoded along with the new ones, since what a token looks like can depend on those before it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_shown = 0  # ids of the window whose text is out

    def decode(self, tokens: Sequence[int]) -> str:
        """Takes more ids, and returns the text that is certain by now."""
        self._window.extend(tokens)
        text = self._pending()
        return "" if text.endswith(_INCOMPLETE) else self._show(text)

    def flush(self) -> str:
        """Returns what is left at the stream's end, incomplete characters included."""
        return self._show(self._pending())

    def _pending(self) -> str:
        shown = self._tokenizer.decode(self._window[: self._num_shown])
        return self._tokenizer.decode(self._window)[len(shown) :]

    def _show(self, text: str) -> str:
        if text:  # ids that show nothing, such as special tokens, are no window: what follows would look like a text's start
            self._window = self._window[self._num_shown :]
            self._num_shown = len(self._window)
        return text


class StopStrings:
    """Cuts a stream of text at the first of some strings, also where one is spread over several pieces.

    Args:
        stops: the strings; the text ends before the one that is complete first, the longest if there are several.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """Takes more text, and returns what is certain to stand before any stop string."""
        self._held += text
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            _, place = min(found)
            return self._release(place)
        return self._release(len(self._held) - self._overlap())

    def flush(self) -> str:
        """Returns what was held back, at the stream's end; nothing once it is stopped."""
        return "" if self.is_stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released

    def _overlap(self) -> int:
        """The length of the longest end of the held text that a stop string begins with."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])),
            default=0,
        )


class StopCriterion:
    """Watches a stream of ids for strings that end it.

    Args:
        tokenizer: turns the ids into text.
        stops: the strings.
        min_tokens: nothing ends the stream before so many ids.
    """

    def __init__(self, tokenizer: Tokenizer, stops: str | Sequence[str], min_tokens: int = 0) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._stops = StopStrings([stops] if isinstance(stops, str) else stops)
        self._num_free = min_tokens

    def feed(self, tokens: Sequence[int]) -> int | None:
        """Takes more ids; returns how many of them stand up to the end of a stop string, None if there is none."""
        for count, token in enumerate(tokens, start=1):
            text = self._detokenizer.decode([token])
            if self._num_free > 0:
                self._num_free -= 1
            elif self._stops.feed(text) is not None and self._stops.is_stopped:
                return count
        return None
