"""A configuration and blocks in, a draft model out: distilled from its target, or fine-tuned on text. One process of several.

How the blocks are made and the processes started is not known here; `jobs/train_draft.py` does so with Ray.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from specdecode.config import StrictModel
from specdecode.embedded import resolve_model
from specdecode.errors import ConfigError, ModelError
from specdecode.training.checkpoints import (
    add_layers,
    check_new_layers,
    check_num_layers,
    keep_first_layers,
    load_model,
    load_shape,
    load_tokenizer,
)
from specdecode.training.completions import CompletionConfig
from specdecode.training.data import TRAINING, VALIDATION, DataConfig, read_blocks
from specdecode.training.examples import Example, end_of_text
from specdecode.training.losses import LossConfig
from specdecode.training.packing import pack
from specdecode.training.reporting import LoggingConfig
from specdecode.training.trainer import DraftTrainer, TrainingConfig, TrainingResult

PROMPTS = "prompts.parquet"


class DraftModelConfig(StrictModel):
    """The two models."""

    draft_model: str = Field(default="Qwen/Qwen2.5-1.5B", description="what is trained: a name or a folder")
    target_model: str | None = Field(default="Qwen/Qwen2.5-7B", description="what is learned from, or only compared with")
    num_layers: int | None = Field(default=None, gt=0, description="make a smaller draft of the first layers of draft_model")
    new_layers: int = Field(default=0, ge=0, description="layers to put on top, which change nothing until they are trained")


class DistillationConfig(StrictModel):
    """How to learn from the target; not enabled, the draft is fine-tuned on the text alone.

    Of the blocks, `target_share` are what the target says and the others the data's own text; in `student_share` of the steps
    the student learns from what it says itself, for which the target corrects it.
    """

    enabled: bool = False
    loss: LossConfig = Field(default_factory=LossConfig)
    target_share: float = Field(default=0.75, ge=0, le=1)
    student_share: float = Field(default=0.0, ge=0, le=1)
    completions: CompletionConfig = Field(default_factory=CompletionConfig, description="what the target is asked")
    completions_dir: str | None = Field(
        default=None, description="answers that jobs.generate_data has made; made in OUTPUT_DIR/completions if unset"
    )
    teacher_cache: str | None = Field(
        default=None, description="blocks with what the target says of them, made by jobs.cache_teacher from the same config"
    )


class DraftTrainingConfig(StrictModel):
    """Everything about the training of a draft."""

    model: DraftModelConfig = Field(default_factory=DraftModelConfig)
    data: DataConfig
    also_validate: dict[str, DataConfig] = Field(
        default_factory=dict,
        description="held-out data of other domains, by the name to show: does not decide which checkpoint is best",
    )
    training: TrainingConfig
    distillation: DistillationConfig = Field(default_factory=DistillationConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @model_validator(mode="after")
    def _check(self) -> "DraftTrainingConfig":
        distillation = self.distillation
        if distillation.enabled and self.model.target_model is None:
            raise ValueError("model.target_model: expected a model to distil from, as distillation.enabled is true")
        if distillation.student_share and (self.training.parallelism == "fsdp" or distillation.teacher_cache):
            raise ValueError("distillation.student_share: expected 0 with parallelism fsdp or a teacher_cache")
        return self

    @property
    def loss(self) -> LossConfig:
        """What is minimised: the text's own surprise where nothing is distilled."""
        only_text = LossConfig(divergence_weight=0.0, cross_entropy_weight=1.0)
        return self.distillation.loss if self.distillation.enabled else only_text


def learn(
    config: DraftTrainingConfig, blocks: Path, checkpoint: Path | None = None, callbacks: list[TrainerCallback] | None = None
) -> TrainingResult:
    """Trains a draft on blocks that are there, as one of perhaps several processes; the best one is in OUTPUT_DIR/best.

    Args:
        config: everything.
        blocks: the folder of TRAINING and VALIDATION.
        checkpoint: where to go on from.
        callbacks: are told of what happens.

    Raises:
        ModelError: a model does not load, or the two do not share a vocabulary.
    """
    torch.manual_seed(config.training.seed)
    tokenizer = load_tokenizer(resolve_model(config.model.draft_model))
    draft = load_draft(config.model)
    cache = config.distillation.teacher_cache if config.distillation.enabled else None
    teacher = None if cache or config.model.target_model is None else load_teacher(config.model.target_model, tokenizer)
    share = config.distillation.student_share if config.distillation.enabled else 0.0
    trainer = DraftTrainer(
        draft,
        teacher,
        tokenizer,
        config.loss,
        read_blocks(blocks / TRAINING),
        read_blocks(blocks / VALIDATION),
        config.training,
        config.logging,
        vocab_size=shared_vocabulary(config.model) if cache else None,
        speak=speaker(blocks / PROMPTS, tokenizer, config) if share else None,
        own_share=share,
        asides=frozenset(config.also_validate),
        callbacks=callbacks,
    )
    return trainer.run(checkpoint)


def speaker(
    prompts: Path, tokenizer: PreTrainedTokenizerBase, config: DraftTrainingConfig
) -> Callable[[PreTrainedModel, np.random.Generator], list[dict[str, Tensor]]]:
    """Lets a student answer prompts, by transformers' `generate`; what it says is a batch for each accumulation step."""
    asked = read_prompts(prompts)
    training, settings = config.training, config.distillation.completions

    def speak(student: PreTrainedModel, rng: np.random.Generator) -> list[dict[str, Tensor]]:
        return list(_speak(student, rng))

    def _speak(student: PreTrainedModel, rng: np.random.Generator) -> Iterator[dict[str, Tensor]]:
        was_training = student.training
        student.eval()
        for _ in range(training.gradient_accumulation_steps):
            chosen = [asked[index] for index in rng.integers(0, len(asked), training.per_device_batch_size)]
            yield _batch(_answers(student, chosen, tokenizer, settings, int(rng.integers(2**31))), training, tokenizer)
        student.train(was_training)

    return speak


def _answers(
    student: PreTrainedModel, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, config: CompletionConfig, seed: int
) -> list[Example]:
    """What the student says after each prompt, sampled."""
    pad_id, longest = end_of_text(tokenizer), max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=student.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=student.device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        output = student.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=config.max_new_tokens,
            do_sample=True,
            temperature=config.temperature,
            top_k=0,
            pad_token_id=pad_id,
        )
    stops = student.generation_config.eos_token_id
    stop_ids = set(stops) if isinstance(stops, list) else {stops}
    return [
        Example.answer(prompt, _until_stop(row, stop_ids))
        for prompt, row in zip(prompts, output[:, longest:].tolist(), strict=True)
    ]


def _until_stop(tokens: list[int], stop_ids: set[int | None]) -> list[int]:
    end = next((place for place, token in enumerate(tokens, start=1) if token in stop_ids), len(tokens))
    return tokens[:end]


def _batch(examples: list[Example], config: TrainingConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """As many blocks as a batch has at the most; what does not fit is left out."""
    blocks = list(pack(examples, config.sequence_length, end_of_text(tokenizer)))[: config.per_device_batch_size]
    names = ("input_ids", "position_ids", "labels")
    return {name: torch.from_numpy(np.stack([getattr(block, name) for block in blocks])).long() for name in names}


def load_draft(config: DraftModelConfig) -> PreTrainedModel:
    """The model to train."""
    draft = load_model(resolve_model(config.draft_model))
    if config.num_layers is not None:
        keep_first_layers(draft, config.num_layers)
    return add_layers(draft, config.new_layers)


def load_teacher(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The target, to listen to.

    Raises:
        ModelError: it does not load, or its tokens are not the draft's.
    """
    check_vocabulary(name, tokenizer)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return load_model(resolve_model(name), dtype).eval().requires_grad_(False)


def shared_vocabulary(config: DraftModelConfig) -> int:
    """How many tokens both models have logits for; the longer one's others are padding."""
    names = [name for name in (config.draft_model, config.target_model) if name is not None]
    return min(int(load_shape(resolve_model(name)).vocab_size) for name in names)


def check_models(config: DraftModelConfig) -> None:
    """Raises a `ModelError` unless both models are there and share a vocabulary; loads no weights."""
    shape = load_shape(resolve_model(config.draft_model))
    if config.num_layers is not None:
        check_num_layers(shape, config.num_layers)
    if config.new_layers:
        with torch.device("meta"):
            check_new_layers(AutoModelForCausalLM.from_config(shape))
    tokenizer = load_tokenizer(resolve_model(config.draft_model))
    if config.target_model is not None:
        load_shape(resolve_model(config.target_model))
        check_vocabulary(config.target_model, tokenizer)


def check_vocabulary(target: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a `ModelError` unless the target's tokens are the tokenizer's."""
    if load_tokenizer(resolve_model(target)).get_vocab() != tokenizer.get_vocab():
        raise ModelError(f"model.target_model: {target} has another vocabulary than the draft: expected the same tokenizer")


def read_prompts(path: Path) -> list[list[int]]:
    """Prompts as ids."""
    found: list[list[int]] = pq.read_table(path)["prompt"].to_pylist()
    if not found:
        raise ConfigError(f"{path}: expected prompts, found none")
    return found
