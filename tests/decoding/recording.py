"""Backends for tests: one that records what it is asked, and one whose text is known beforehand."""

from collections.abc import Sequence

import torch

from specdecode.backends.backend import ModelBackend, Row
from specdecode.backends.table import TableModel


class RecordingBackend:
    """Passes every call on to another backend, and keeps the rows of each."""

    def __init__(self, backend: ModelBackend) -> None:
        self.name = backend.name
        self.vocab_size = backend.vocab_size
        self.max_length = backend.max_length
        self.eos_token_ids = backend.eos_token_ids
        self.vocabulary_id = backend.vocabulary_id
        self.calls: list[list[Row]] = []
        self._backend = backend

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        self.calls.append(list(rows))
        return self._backend.logits(rows)

    def num_remembered(self, tokens: list[int]) -> int:
        return self._backend.num_remembered(tokens)


def counting_model(vocab_size: int = 10, *, max_length: int = 1 << 20, eos_token_ids: Sequence[int] = ()) -> TableModel:
    """A model that is certain of the next number: 1 after 0, 2 after 1, and 0 after the last."""

    def distribution(tokens: tuple[int, ...]) -> torch.Tensor:
        one_hot = torch.zeros(vocab_size, dtype=torch.float64)
        one_hot[(tokens[-1] + 1) % vocab_size if tokens else 0] = 1
        return one_hot

    return TableModel(distribution, max_length=max_length, eos_token_ids=eos_token_ids)
