"""A draft model in a replica: sequences in, guesses out."""

import asyncio

from serve.channel import Ask, Guess
from specdecode.backends.backend import ModelConfig, open_model
from specdecode.decoding.drafters import ModelDrafter


class DraftServer:
    """Guesses for any number of targets, one batch at a time.

    Args:
        model: the draft model.
        support: how many tokens each q covers at the most.
    """

    def __init__(self, model: ModelConfig, support: int) -> None:
        self._backend = open_model(model)
        self._support = support
        self._turn = asyncio.Lock()

    async def propose(self, asks: list[Ask], vocab_size: int) -> list[Guess]:
        """Drafts for each sequence tokens below `vocab_size`."""
        async with self._turn:
            return await asyncio.to_thread(self._propose, asks, vocab_size)

    def _propose(self, asks: list[Ask], vocab_size: int) -> list[Guess]:
        drafter = ModelDrafter(self._backend, support=self._support, vocab_size=min(vocab_size, self._backend.vocab_size))
        return [Guess.of(draft) for draft in drafter.propose([ask.sequence() for ask in asks])]
