"""A draft model in a replica: sequences in, guesses out."""

import asyncio

from serve.channel import Ask, Guess, ModelTokens
from serve.config import DraftModelConfig
from specdecode.backends.backend import ModelBackend, open_model
from specdecode.decoding.drafters import ModelDrafter
from specdecode.vocabulary import translate


class DraftServer:
    """Guesses for any number of targets, one batch at a time.

    Args:
        config: the draft model, and how it drafts.
    """

    def __init__(self, config: DraftModelConfig) -> None:
        self._backend = open_model(config.model_config_only())
        self._config = config
        self._drafters: dict[ModelTokens, ModelDrafter] = {}
        self._turn = asyncio.Lock()

    async def propose(self, asks: list[Ask], target: ModelTokens) -> list[Guess]:
        """Drafts for each sequence of a target."""
        async with self._turn:
            return await asyncio.to_thread(self._propose, asks, target)

    def _propose(self, asks: list[Ask], target: ModelTokens) -> list[Guess]:
        if target not in self._drafters:  # to compare two vocabularies takes a while
            self._drafters[target] = model_drafter(self._backend, self._config, target)
        return [Guess.of(draft) for draft in self._drafters[target].propose([ask.sequence() for ask in asks])]


def model_drafter(backend: ModelBackend, config: DraftModelConfig, target: ModelTokens) -> ModelDrafter:
    """Makes a drafter of the open model `backend`, as its configuration says.

    Raises:
        ModelError: its vocabulary has too little in common with the target's.
    """
    return ModelDrafter(
        backend,
        translate(backend, target),
        eos_token_ids=target.eos_token_ids,
        support=config.support,
        min_confidence=config.min_confidence,
    )
