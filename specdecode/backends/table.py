"""A language model that is a lookup table: exact, instant, and any distribution one likes."""

from collections.abc import Callable, Sequence

import torch

from specdecode.backends.backend import Row


class TableModel:
    """A `ModelBackend` whose next-token distribution is a given function of the tokens before.

    Args:
        distribution: maps a tuple of tokens to the probabilities of the next one, [vocab_size];
            any float dtype, which the logits keep.
        max_length: the longest sequence, in tokens.
        eos_token_ids: tokens that end a generation.
    """

    def __init__(
        self,
        distribution: Callable[[tuple[int, ...]], torch.Tensor],
        *,
        max_length: int = 1 << 20,
        eos_token_ids: Sequence[int] = (),
        name: str = "table",
    ) -> None:
        self.name = name
        self.max_length = max_length
        self.eos_token_ids = frozenset(eos_token_ids)
        self._distribution = distribution
        self.vocab_size = len(distribution(()))
        self.vocabulary_id = f"{self.vocab_size} tokens"

    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Scores each row by looking its prefixes up; see `ModelBackend.logits`."""
        prefixes = [
            tuple(row.tokens[:end]) for row in rows for end in range(len(row.tokens) - row.num_scored + 1, len(row.tokens) + 1)
        ]
        if not prefixes:
            return torch.empty(0, self.vocab_size)
        return torch.stack([self._distribution(prefix) for prefix in prefixes]).log()  # [sum(num_scored), vocab_size]

    def num_remembered(self, tokens: list[int]) -> int:  # noqa: ARG002
        """None: a look-up is as fast as a memory."""
        return 0


def random_table(
    vocab_size: int, seed: int, *, dtype: torch.dtype = torch.float64, order: int = 2, sharpness: float = 1.0
) -> Callable[[tuple[int, ...]], torch.Tensor]:
    """Makes a random distribution over the next token for every context of the last `order` tokens.

    `sharpness` scales random normal logits: 0 is uniform, large values are nearly deterministic.
    """

    def distribution(tokens: tuple[int, ...]) -> torch.Tensor:
        context = 0
        for token in tokens[-order:] if order else ():
            context = context * (vocab_size + 1) + token + 1
        generator = torch.Generator().manual_seed(seed * 1_000_003 + context)
        return torch.softmax(sharpness * torch.randn(vocab_size, generator=generator, dtype=dtype), dim=-1)

    return distribution
