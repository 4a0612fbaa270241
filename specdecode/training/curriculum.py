"""Documents and a target in, the batches that a draft learns from out. Knows nothing of the draft."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdecode.config import StrictModel
from specdecode.training.blocks import Batch, TokenStream, encode, end_of_text, mix
from specdecode.training.continuations import Continuation, continuation_batches, continue_prompts, remember
from specdecode.training.documents import Document
from specdecode.training.prompts import sample_prompts
from specdecode.training.sources import DraftDataConfig, source_weights
from specdecode.training.trainer import TrainingConfig

Documents = dict[str, list[Document]]  # by source


class DistillationConfig(StrictModel):
    """How to learn from the target; `enabled: false` fine-tunes on the text alone.

    `num_prompts` prompts of the domain are continued by the target, `sampled_share` of them at `temperature` and the
    others greedily. `text_share` of the batches are the domain's own text, the others are these continuations.
    """

    enabled: bool = True
    num_prompts: int = Field(default=2000, gt=0)
    max_prompt_length: int = Field(default=160, gt=0)
    max_new_tokens: int = Field(default=160, gt=0)
    sampled_share: float = Field(default=0.25, ge=0, le=1)
    temperature: float = Field(default=0.8, gt=0)
    generation_batch_size: int = Field(default=64, gt=0)
    text_share: float = Field(default=0.25, ge=0, le=1)
    greedy_weight: float = Field(default=0.0, ge=0)


def text_batches(
    training: Documents,
    held_out: Documents,
    tokenizer: PreTrainedTokenizerBase,
    data: DraftDataConfig,
    config: TrainingConfig,
) -> tuple[Iterator[Batch], dict[str, list[Batch]]]:
    """Endless batches of the training documents' text, and the validation batches of the held-out ones."""

    def batches(documents: Documents, seed: int) -> Iterator[Batch]:
        rng = np.random.default_rng([config.seed, seed])
        streams = {
            source: TokenStream([encode(document, tokenizer) for document in found], rng) for source, found in documents.items()
        }
        return mix(streams, source_weights(data), config.per_device_batch_size, config.sequence_length, rng)

    validation = list(itertools.islice(batches(held_out, 1), config.num_validation_batches))
    return batches(training, 0), {"text": validation}


class Prompter:
    """Lets the target continue prompts taken from documents, and makes batches of what it says."""

    def __init__(
        self,
        target: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        distillation: DistillationConfig,
        training: TrainingConfig,
        weights: dict[str, float],
    ) -> None:
        self._target = target
        self._tokenizer = tokenizer
        self._distillation = distillation
        self._training = training
        self._weights = weights
        self._pad_id = end_of_text(tokenizer)

    def mix_in_continuations(self, texts: Iterator[Batch], documents: Documents) -> Iterator[Batch]:
        """Endless batches, `text_share` of them from `texts` and the others continuations of the documents' prompts.

        The continuations are kept in OUTPUT_DIR/continuations.jsonl; a run with the same settings takes them from there.
        """
        rng = np.random.default_rng([self._training.seed, 2])
        continuations = remember(
            Path(self._training.output_dir) / "continuations.jsonl",
            {"target": self._target.name_or_path, "weights": self._weights, "seed": self._training.seed}
            | self._distillation.model_dump(),
            lambda: self._continue(documents, self._distillation, rng),
        )
        rng = np.random.default_rng([self._training.seed, 3])
        batches = continuation_batches(continuations, self._training.per_device_batch_size, self._pad_id, rng)
        while True:
            yield next(texts if rng.random() < self._distillation.text_share else batches)

    def validation_batches(self, documents: Documents) -> list[Batch]:
        """Greedy continuations of prompts from held-out documents."""
        rng = np.random.default_rng([self._training.seed, 4])
        num_batches, batch_size = self._training.num_validation_batches, self._training.per_device_batch_size
        settings = {"sampled_share": 0.0, "num_prompts": num_batches * batch_size}
        continuations = self._continue(documents, self._distillation.model_copy(update=settings), rng)
        batches = continuation_batches(continuations, batch_size, self._pad_id, rng)
        return list(itertools.islice(batches, num_batches))

    def _continue(self, documents: Documents, config: DistillationConfig, rng: np.random.Generator) -> list[Continuation]:
        prompts = self._sample_prompts(documents, config, rng)
        is_sampled = rng.random(len(prompts)) < config.sampled_share
        return [
            continuation
            for temperature, chosen in ((0.0, ~is_sampled), (config.temperature, is_sampled))
            for continuation in continue_prompts(
                self._target,
                list(itertools.compress(prompts, chosen)),
                config.max_new_tokens,
                temperature,
                config.generation_batch_size,
                self._pad_id,
            )
        ]

    def _sample_prompts(self, documents: Documents, config: DistillationConfig, rng: np.random.Generator) -> list[list[int]]:
        """Prompts from each source in proportion to its weight."""
        total = sum(self._weights.values())
        shares = {source: round(config.num_prompts * weight / total) for source, weight in self._weights.items()}
        return [
            prompt
            for source, found in documents.items()
            for prompt in sample_prompts(found, self._tokenizer, shares[source], config.max_prompt_length, rng)
        ]
