"""Text to token ids and back: all that knows a tokenizer. Knows no model."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
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


def check_same_vocabulary(draft: HasVocabulary, target: HasVocabulary) -> None:
    """Raises a `ModelError` unless the draft means by its token ids what the target means."""
    if draft.vocabulary_id != target.vocabulary_id:
        raise ModelError(
            f"draft {draft.name!r} has another vocabulary than target {target.name!r}: expected the same tokenizer"
        )


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

    def decode(self, tokens: Sequence[int]) -> str:
        """Turns ids into text, without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

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
