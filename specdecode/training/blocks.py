"""Documents in, batches of token ids out. Knows nothing of models and losses."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specdecode.training.documents import Document


@dataclass(frozen=True)
class Batch:
    """Token ids [batch, length], and which of them count as predictions (bool, same shape; the first column never does)."""

    ids: Tensor
    is_scored: Tensor


def encode(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a whole document, with the end-of-text token at its end."""
    if document.is_conversation:
        ids = encode_chat(document, tokenizer, add_generation_prompt=False)
    else:
        ids = encode_text(document.text, tokenizer)
    return [*ids, end_of_text(tokenizer)]


def encode_chat(document: Document, tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool) -> list[int]:
    """The ids of a conversation in the tokenizer's own chat format."""
    turns = [{"role": message.role, "content": message.content} for message in document.messages]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=False)
    return encode_text(text, tokenizer)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text with nothing added; texts longer than the model's context are welcome."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that separates documents: the padding token where there is one, or else the end of sequence."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


class TokenStream:
    """Documents as an endless stream of ids: one after another, in a new random order at each pass."""

    def __init__(self, documents: Sequence[Sequence[int]], rng: np.random.Generator) -> None:
        assert any(len(ids) for ids in documents), "a stream needs tokens"
        self._documents = [np.asarray(ids, dtype=np.int64) for ids in documents]
        self._rng = rng
        self._rest = np.empty(0, dtype=np.int64)

    def take(self, count: int) -> np.ndarray:
        """The next `count` ids."""
        while len(self._rest) < count:
            order = self._rng.permutation(len(self._documents))
            self._rest = np.concatenate([self._rest, *(self._documents[index] for index in order)])
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken


def mix(
    streams: dict[str, TokenStream], weights: dict[str, float], batch_size: int, length: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """Endless full batches [batch_size, length]; each row comes from one stream, drawn with its weight."""
    names = list(weights)
    shares = np.array([weights[name] for name in names], dtype=np.float64)
    shares /= shares.sum()
    while True:
        chosen = rng.choice(len(names), size=batch_size, p=shares)
        ids = torch.from_numpy(np.stack([streams[names[index]].take(length) for index in chosen]))
        yield Batch(ids, _all_but_first(ids))


def pad(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """One batch of (prompt, continuation) pairs, padded on the right; only the continuations are scored."""
    length = max(len(prompt) + len(continuation) for prompt, continuation in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    is_scored = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, (prompt, continuation) in enumerate(rows):
        end = len(prompt) + len(continuation)
        ids[index, :end] = torch.tensor(prompt + continuation)
        is_scored[index, max(1, len(prompt)) : end] = True
    return Batch(ids, is_scored)


def _all_but_first(ids: Tensor) -> Tensor:
    is_scored = torch.ones_like(ids, dtype=torch.bool)
    is_scored[:, 0] = False
    return is_scored
