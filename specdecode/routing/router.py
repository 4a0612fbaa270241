"""Prompts in, for each the drafts that may guess and what is expected of them out.

Which of them guesses, and how much, is decided where times are measured: `decoding.control` takes the draft that promises most
tokens per second, and leaves it when it disappoints. What then came of it corrects what is expected of prompts like this one.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Several
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from specdecode.backends.backend import ModelBackend
from specdecode.config import StrictModel, check_config, load_config
from specdecode.decoding.control import AdaptiveLength
from specdecode.decoding.drafters import Drafter, RoutedDrafter
from specdecode.decoding.loop import as_drafter, speculative_decode
from specdecode.decoding.metrics import DecodingMetrics, Verdicts
from specdecode.decoding.sequence import Arm
from specdecode.errors import ConfigError, ModelError
from specdecode.routing.correction import Correction
from specdecode.routing.features import Features
from specdecode.routing.forecast import Forecast
from specdecode.routing.model import AcceptanceModel, sigmoid
from specdecode.routing.pending import PendingForecasts
from specdecode.text import Tokenizer


class RoutingConfig(StrictModel):
    """A router, and how it is used."""

    checkpoint: str = Field(description="a folder that jobs.train_router has made")
    encoder: str | None = Field(default=None, description="its sentence encoder by another name or path, as where it is a copy")
    device: str | None = Field(default="cpu", description="of the encoder; the best there is if null")
    tokenizer: str | None = Field(default=None, description="the target's, to read prompts that are given as ids")
    corrects: bool = Field(default=True, description="learn from what drafts turn out to do")


class AdaptiveRouter:
    """Forecasts how well each draft guesses on a prompt.

    Args:
        model: the network.
        features: what it looks at.
        tokenizer: the target's, for prompts that are given as ids.
        corrects: whether `learn` changes what is expected.

    Raises:
        ModelError: the encoder's embeddings are not those that the network has learned from.
    """

    def __init__(
        self, model: AcceptanceModel, features: Features, tokenizer: Tokenizer | None = None, *, corrects: bool = True
    ) -> None:
        if features.names != model.about.features:
            raise ModelError(
                f"encoder {features.encoder}: has {features.width} dimensions: expected those of {model.about.encoder}, "
                f"{len(model.about.features)} features in all"
            )
        self._model = model
        self._features = features
        self._tokenizer = tokenizer
        self._correction = Correction(model.about.arms, features.width) if corrects else None
        self._length = AdaptiveLength()  # of `route_and_decode`: what things take is learned once
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="router")  # started when it is needed

    @staticmethod
    def from_config(
        config: "RoutingConfig | dict[str, Any] | str | Path", drafts: Several[str] | None = None
    ) -> "AdaptiveRouter":
        """Loads a router.

        Args:
            config: itself, its values, or a YAML file of them.
            drafts: the drafts that there are; not compared with the router's if None.

        Raises:
            ConfigError: the configuration is wrong.
            ModelError: the checkpoint or the encoder does not load, or is one for other drafts.
        """
        if isinstance(config, (str, Path)):
            config = load_config(config, RoutingConfig)
        elif isinstance(config, dict):
            config = check_config(config, RoutingConfig, where="router")
        model = AcceptanceModel.load(config.checkpoint, drafts)
        features = Features(config.encoder or model.about.encoder, device=config.device)
        tokenizer = None if config.tokenizer is None else Tokenizer(config.tokenizer)
        return AdaptiveRouter(model, features, tokenizer, corrects=config.corrects)

    @property
    def drafts(self) -> list[str]:
        """The drafts that it tells apart."""
        return self._model.about.arms

    def forecast(self, texts: Several[str], num_tokens: Several[int], is_chat: Several[bool]) -> list[Forecast]:
        """What is expected of each draft on each prompt; see `Features.of` for the arguments."""
        features = self._features.of(texts, num_tokens, is_chat)
        embeddings = features[:, : self._features.width]
        logits = self._model.logits(features)
        corrected = logits if self._correction is None else logits + self._correction.at(embeddings)
        return [self._forecast(*rows) for rows in zip(embeddings, sigmoid(logits), sigmoid(corrected), strict=True)]

    def begin(self, texts: Several[str], num_tokens: Several[int], is_chat: Several[bool]) -> "Future[list[Forecast]]":
        """The same on a thread of its own, while the caller does something else, such as to read the prompt."""
        return self._thread.submit(self.forecast, texts, num_tokens, is_chat)

    def _forecast(self, embedding: np.ndarray, uncorrected: np.ndarray, expected: np.ndarray) -> Forecast:
        about = self._model.about
        arms = [Arm(*values) for values in zip(about.arms, expected.tolist(), about.weights, strict=True)]
        arms.sort(key=lambda arm: -arm.acceptance)
        return Forecast(tuple(arms), embedding, dict(zip(about.arms, uncorrected.tolist(), strict=True)))

    def learn(self, forecast: Forecast, verdicts: Mapping[str, Verdicts]) -> None:
        """Takes what came of a forecast: verdicts on the tokens of each draft that was asked."""
        if self._correction is None:
            return
        for name, found in verdicts.items():
            num_verdicts = found.num_accepted + found.num_rejected
            if name in forecast.uncorrected:
                self._correction.add(forecast.embedding, name, forecast.uncorrected[name], found.num_accepted, num_verdicts)

    def route_and_decode(
        self,
        target: ModelBackend,
        draft_models: Mapping[str, ModelBackend | Drafter],
        input_ids: torch.Tensor,
        max_new_tokens: int = 128,
        K: int = 5,  # noqa: N803  the name that the literature uses
        **options: Any,
    ) -> tuple[torch.Tensor, DecodingMetrics]:
        """Decodes one prompt with the drafts that suit it, as `speculative_decode` does with one.

        It does not wait for its forecast, but decodes plainly until that is there: a short answer is not held up by it.

        Args:
            target: the model whose output it is.
            draft_models: all drafts that the router tells apart, by name.
            input_ids: LongTensor [1, length].
            max_new_tokens: generate at the most so many tokens.
            K: draft at the most so many tokens in a round.
            **options: those of `speculative_decode`.

        Returns:
            LongTensor [1, length + generated], and what it took; `metrics.verdicts` says which drafts guessed.

        Raises:
            ConfigError: the router was loaded without a tokenizer.
            ModelError: the drafts are not the router's, or a vocabulary has too little in common with the target's.
            RequestError: a parameter is out of its range.
        """
        if set(draft_models) != set(self.drafts):
            raise ModelError(
                f"draft_models: expected {sorted(self.drafts)}, which the router tells apart, got {sorted(draft_models)}"
            )
        if self._tokenizer is None:
            raise ConfigError("router: tokenizer: expected the target's, to read the prompt, got none")
        drafter = RoutedDrafter({name: as_drafter(draft, target) for name, draft in draft_models.items()})
        tokens = input_ids.flatten().tolist()
        is_chat = not self._tokenizer.special_ids.isdisjoint(tokens[len(self._tokenizer.start_ids) :])
        count = options.get("n", 1)
        pending = self.begin([self._tokenizer.decode(tokens).strip()] * count, [len(tokens)] * count, [is_chat] * count)
        options = {"adaptive": PendingForecasts(pending, K, self._length), "tokenizer": self._tokenizer, **options}
        output, metrics = speculative_decode(target, drafter, input_ids, max_new_tokens, K, **options)
        if metrics.verdicts:
            self.learn(pending.result()[0], metrics.verdicts)
        return output, metrics
