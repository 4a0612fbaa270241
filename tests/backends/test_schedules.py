"""Whatever sequences a server may send, in whatever order, the logits are those of the model without a cache."""

import random

import pytest
from transformers import LlamaConfig, MistralConfig

from specdecode.backends.backend import Row
from specdecode.backends.huggingface import HuggingFaceBackend
from tests.backends.recomputing import assert_equals_recomputed, random_tokens

WINDOW, MAX_ROWS, NUM_CALLS = 6, 4, 40
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "eos_token_id": None}
MODELS = {"llama": LlamaConfig(**SIZES), "mistral-sliding": MistralConfig(**SIZES, sliding_window=WINDOW)}


class Schedule:
    """Sequences that join, grow, roll back, share prefixes, vanish and come back, more of them than the cache has rows."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.live: dict[str, list[int]] = {}
        self.gone: dict[str, list[int]] = {}
        self.num_joined = 0
        for _ in range(MAX_ROWS):
            self.join()

    def advance(self) -> list[Row]:
        """Lets something happen, and returns a batch of some of the living in random order."""
        self.rng.choice([self.join, self.branch, self.vanish, self.come_back, self.roll_back, self.roll_back, lambda: None])()
        names = self.rng.sample(sorted(self.live), self.rng.randint(1, min(MAX_ROWS + 2, len(self.live))))
        for name in names:
            self.live[name] = self.live[name] + random_tokens(self.rng, self.rng.randint(1, 6))
        return [Row(name, self.live[name], self.rng.randint(0, min(6, len(self.live[name])))) for name in names]

    def join(self) -> None:
        self._add(random_tokens(self.rng, self.rng.randint(1, 20)))

    def branch(self) -> None:
        tokens = self._any()[1]
        self._add(tokens[: self.rng.randint(1, len(tokens))])

    def vanish(self) -> None:
        if len(self.live) > 2:
            name = self._any()[0]
            self.gone[name] = self.live.pop(name)

    def come_back(self) -> None:
        if self.gone:
            name = self.rng.choice(sorted(self.gone))
            self.live[name] = self.gone.pop(name)

    def roll_back(self) -> None:
        name, tokens = self._any()
        self.live[name] = tokens[: max(1, len(tokens) - self.rng.randint(1, 8))]

    def _any(self) -> tuple[str, list[int]]:
        return self.rng.choice(sorted(self.live.items()))

    def _add(self, tokens: list[int]) -> None:
        self.live[f"seq-{self.num_joined}"] = tokens
        self.num_joined += 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("preallocate", [False, True], ids=["growing", "preallocated"])
@pytest.mark.parametrize("family", MODELS)
def test_any_schedule_equals_recomputing(family, preallocate, seed, save_model):
    backend = HuggingFaceBackend(
        save_model(MODELS[family], seed), dtype="float32", max_rows=MAX_ROWS, max_length=256, preallocate=preallocate
    )
    schedule, num_evicted, longest = Schedule(seed), 0, 0
    for _ in range(NUM_CALLS):
        rows = schedule.advance()
        before = {memo.id for memo in backend.cache.rows}
        assert_equals_recomputed(backend, rows, tolerance=1e-4)
        backend.cache.check()
        num_evicted += len(before - {memo.id for memo in backend.cache.rows})
        longest = max(longest, *(len(row.tokens) for row in rows))
    assert num_evicted > 5
    assert longest > 3 * WINDOW
