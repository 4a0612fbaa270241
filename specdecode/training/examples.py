"""Documents in, token ids out, with which of them a model learns to say. Knows nothing of batches.

What a draft guesses is what its target says: in a conversation the assistant's turns are learned and the others are only read;
of plain text all is learned but its first token.
"""

import random
from collections.abc import Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from specdecode.errors import ConfigError
from specdecode.training.documents import Document

# The three marks of fill-in-the-middle, as the tokenizers of code models call them.
_FIM_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
)


@dataclass(frozen=True, eq=False)
class Example:
    """Token ids, int32 [n], and which of them are learned, bool [n]; the first never is, as nothing comes before it."""

    ids: np.ndarray
    is_scored: np.ndarray

    @staticmethod
    def of(ids: Several[int], is_scored: Several[bool]) -> "Example":
        """Makes one of lists."""
        example = Example(np.array(ids, dtype=np.int32), np.array(is_scored, dtype=bool))
        assert example.ids.shape == example.is_scored.shape
        example.is_scored[:1] = False
        return example

    @staticmethod
    def answer(prompt: list[int], tokens: list[int]) -> "Example":
        """What was said after a prompt, which is only read."""
        return Example.of(prompt + tokens, [False] * len(prompt) + [True] * len(tokens))


class Formatter:
    """Writes documents down as a tokenizer's model reads them.

    Args:
        tokenizer: the model's.
        fim_rate: how many of the plain texts, of 1, are turned into tasks to fill in their middle (Bavarian et al. 2022, arXiv
            2207.14255, in the order prefix, suffix, middle).
        learn_all: whether every turn of a conversation is learned, and not only the assistant's.

    Raises:
        ConfigError: the tokenizer has no marks for fill-in-the-middle.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, fim_rate: float = 0.0, *, learn_all: bool = False) -> None:
        self._tokenizer = tokenizer
        self._fim_rate = fim_rate
        self._learn_all = learn_all
        self._end = end_of_text(tokenizer)
        self._marks = _fim_marks(tokenizer) if fim_rate else []

    def example(self, document: Document) -> Example | None:
        """The document as ids; None if there is nothing in it to learn."""
        example = self._conversation(document) if document.is_conversation else self._text(document.text)
        return example if example.is_scored.any() else None

    def prompt(self, document: Document) -> list[int]:
        """A conversation up to where the assistant speaks next, or a text as it is."""
        if not document.is_conversation:
            return self._encode(document.text)
        return self._encode(self._render(document, len(document.messages), add_generation_prompt=True))

    def _text(self, text: str) -> Example:
        random_numbers = random.Random(text)  # a text is always treated alike
        ids = self._encode(text) if random_numbers.random() >= self._fim_rate else self._split(text, random_numbers)
        return self._plain(ids)

    def _plain(self, ids: list[int]) -> Example:
        return Example.of([*ids, self._end], [True] * (len(ids) + 1))

    def _split(self, text: str, random_numbers: random.Random) -> list[int]:
        start, end = sorted(random_numbers.randint(0, len(text)) for _ in range(2))
        prefix, suffix, middle = (self._encode(part) for part in (text[:start], text[end:], text[start:end]))
        return [self._marks[0], *prefix, self._marks[1], *suffix, self._marks[2], *middle]

    def _conversation(self, document: Document) -> Example:
        """All turns; learned is what stands between the mark that the assistant speaks and the end of its turn."""
        text = self._render(document, len(document.messages))
        if self._learn_all:
            return self._plain(self._encode(text))
        spans = list(self._answers(document, text))
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        is_scored = [any(start < b and a < end for start, end in spans) for a, b in encoded["offset_mapping"]]
        ids = list(encoded["input_ids"])
        return Example.of([*ids, self._end], [*is_scored, False])

    def _answers(self, document: Document, text: str) -> Iterator[tuple[int, int]]:
        """Where the assistant's turns stand in the text; a turn that the template tells otherwise later on is left out."""
        for number, message in enumerate(document.messages):
            if message.role == "assistant":
                before = self._render(document, number, add_generation_prompt=True)
                after = self._render(document, number + 1)
                if text.startswith(after) and after.startswith(before):
                    yield len(before), len(after)

    def _render(self, document: Document, num_turns: int, *, add_generation_prompt: bool = False) -> str:
        turns = [{"role": message.role, "content": message.content} for message in document.messages[:num_turns]]
        if self._tokenizer.chat_template is None:
            lines = [f"{_NAMES.get(turn['role'], turn['role'])}: {turn['content']}\n\n" for turn in turns]
            return "".join(lines) + (f"{_NAMES['assistant']}:" if add_generation_prompt else "")
        text: str = self._tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=False)
        return text

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


# For base models, which have no template: a question, and its worked answer.
_NAMES = {"user": "Question", "assistant": "Answer", "system": "Task"}


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that separates documents: the padding token where there is one, or else the end of sequence."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _fim_marks(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    known = tokenizer.get_vocab()
    for marks in _FIM_MARKS:
        if all(mark in known for mark in marks):
            return [known[mark] for mark in marks]
    raise ConfigError(f"data.fim_rate: expected a tokenizer with marks such as {', '.join(_FIM_MARKS[0])}, it has none")
