"""The slow and obvious way to logits: each sequence alone, whole, without a cache."""

import random

import torch

from specdecode.backends.backend import Row
from specdecode.backends.huggingface import HuggingFaceBackend


def random_tokens(rng: random.Random, count: int, vocab_size: int = 61) -> list[int]:
    return [rng.randrange(vocab_size) for _ in range(count)]


@torch.inference_mode()
def recomputed(backend: HuggingFaceBackend, rows: list[Row]) -> torch.Tensor:
    """The logits that `backend.logits(rows)` promises."""
    parts = []
    for row in rows:
        logits = backend.model.forward(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0]
        parts.append(logits[len(row.tokens) - row.num_scored :])
    return torch.cat(parts)  # [sum(num_scored), vocab_size]


def assert_equals_recomputed(backend: HuggingFaceBackend, rows: list[Row], tolerance: float = 2e-5) -> None:
    logits = backend.logits(rows)
    assert logits.shape == (sum(row.num_scored for row in rows), backend.vocab_size)
    torch.testing.assert_close(logits, recomputed(backend, rows), atol=tolerance, rtol=0)
