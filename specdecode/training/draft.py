"""A configuration in, a draft model out: distilled from its target, or fine-tuned on text."""

from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdecode.config import StrictModel
from specdecode.errors import ModelError
from specdecode.training.blocks import Batch
from specdecode.training.checkpoints import keep_first_layers, load_model, load_tokenizer, save_checkpoint
from specdecode.training.curriculum import DistillationConfig, Prompter, text_batches
from specdecode.training.losses import distillation_loss, next_token_loss, predicting_positions
from specdecode.training.provenance import write_run
from specdecode.training.reporting import LoggingConfig, create_report
from specdecode.training.sources import DraftDataConfig, load_split, source_weights
from specdecode.training.trainer import Loss, TrainingConfig, TrainingResult, fit


class DraftModelConfig(StrictModel):
    """The two models; `num_layers` makes a new, smaller draft from the first layers of `draft_model`."""

    draft_model: str
    target_model: str | None = None
    num_layers: int | None = Field(default=None, gt=0)


class DraftTrainingConfig(StrictModel):
    """Everything about the training of a draft."""

    model: DraftModelConfig
    data: DraftDataConfig
    training: TrainingConfig
    distillation: DistillationConfig = DistillationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _has_a_teacher(self) -> "DraftTrainingConfig":
        if self.distillation.enabled and self.model.target_model is None:
            raise ValueError("model.target_model: expected a model to distil from, as distillation.enabled is true")
        return self


def train_draft(config: DraftTrainingConfig) -> TrainingResult:
    """Trains a draft; its best checkpoint is in OUTPUT_DIR/best, what it took in OUTPUT_DIR/run.json.

    Raises:
        ConfigError: the data or an optional package are not there.
        ModelError: a model does not load, or the two do not share a vocabulary.
    """
    torch.manual_seed(config.training.seed)
    report = create_report(config.logging, config.model_dump())
    tokenizer = load_tokenizer(config.model.draft_model)
    draft = _load_draft(config.model)
    training, held_out = load_split(config.data)
    batches, validation = text_batches(training, held_out, tokenizer, config.data, config.training)
    loss = fine_tuning_loss(draft)
    if config.distillation.enabled:
        target = _load_target(config.model.target_model or "", tokenizer)
        loss = teacher_loss(draft, target, config.distillation.greedy_weight)
        prompter = Prompter(target, tokenizer, config.distillation, config.training, source_weights(config.data))
        batches = prompter.mix_in_continuations(batches, training)
        validation["continuations"] = prompter.validation_batches(held_out)

    def save(folder: Path) -> None:
        save_checkpoint(draft, tokenizer, folder)

    result = fit(draft, loss, batches, validation, config.training, save, report)
    write_run(Path(config.training.output_dir), config, result)
    return result


def fine_tuning_loss(draft: PreTrainedModel) -> Loss:
    """The loss of language modelling: what people wrote is right."""

    def loss(batch: Batch) -> Tensor:
        return next_token_loss(draft(input_ids=batch.ids, use_cache=False).logits, batch.ids, batch.is_scored)

    return loss


def teacher_loss(draft: PreTrainedModel, target: PreTrainedModel, greedy_weight: float) -> Loss:
    """The loss of distillation: what the target would say is right."""

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            p_logits = target(input_ids=batch.ids, use_cache=False).logits
        q_logits = draft(input_ids=batch.ids, use_cache=False).logits
        return distillation_loss(
            predicting_positions(p_logits, batch.is_scored),
            predicting_positions(q_logits, batch.is_scored),
            greedy_weight,
        )

    return loss


def _load_draft(config: DraftModelConfig) -> PreTrainedModel:
    draft = load_model(config.draft_model)
    return draft if config.num_layers is None else keep_first_layers(draft, config.num_layers)


def _load_target(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    if load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
        raise ModelError(f"model.target_model: {name} has another vocabulary than the draft: expected the same tokenizer")
    return load_model(name).eval().requires_grad_(False)
