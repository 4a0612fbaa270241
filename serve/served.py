"""A model that requests may name: how it is reached, what it takes, and what its tokens are called."""

import asyncio
import logging
from typing import NamedTuple

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.errors import UnavailableError
from serve.generation import TargetInfo
from serve.logprobs import TokenNames
from serve.schema import ModelCard
from specdecode.text import Tokenizer

logger = logging.getLogger("ray.serve")

_RETRY_PERIOD_S = 1.0


class DraftModel(NamedTuple):
    """A draft as a model of its own: what it was opened as, and its deployment, None if it is the target's."""

    checkpoint: str
    replicas: DeploymentHandle | None


class Served:
    """The target, or a draft that answers by itself.

    Args:
        name: the model's name over HTTP.
        tokenizer: the model whose tokenizer to use.
        replicas: the deployment that it is in.
        draft: the draft's name there; None for the target.
    """

    def __init__(self, name: str, tokenizer: str, replicas: DeploymentHandle, draft: str | None = None) -> None:
        self.name = name
        self.draft = draft
        self.tokenizer = Tokenizer(tokenizer)
        # gRPC: the target notices a router that was killed, which it does not where Ray's own calls carry the stream.
        self.replicas = replicas.options(method_name="generate", stream=True, _by_reference=False)
        self._describe = replicas.options(method_name="describe")
        self._info: TargetInfo | None = None
        self._names: TokenNames | None = None

    async def meet(self) -> None:
        """Waits until the model is loaded; meanwhile every request is told so."""
        while self._info is None:
            try:
                self._info = await self._describe.remote(self.draft)
            except (RayError, RayServeException) as error:  # noqa: PERF203  once a second
                logger.warning("model %s does not answer yet: %r", self.name, error)
                await asyncio.sleep(_RETRY_PERIOD_S)

    def check_loaded(self) -> None:
        """Raises an `UnavailableError` until it is."""
        if self._info is None:
            raise UnavailableError("the model is still loading: try again later")

    @property
    def info(self) -> TargetInfo:
        """What it takes.

        Raises:
            UnavailableError: it is not loaded yet.
        """
        self.check_loaded()
        assert self._info is not None
        return self._info

    @property
    def names(self) -> TokenNames:
        """What its tokens are called; made once somebody asks."""
        if self._names is None:
            self._names = TokenNames(self.tokenizer, self.info.vocab_size)
        return self._names

    def card(self, created: int, drafts: list[str]) -> ModelCard:
        """Its entry of `/v1/models`."""
        max_length = None if self._info is None else self._info.max_length  # a draft may come later
        return ModelCard(id=self.name, created=created, max_model_len=max_length, drafts=drafts)
