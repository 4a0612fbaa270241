"""A model, blocks and a loss in; the best checkpoint by validation loss out. transformers' `Trainer` does the work.

What is ours is the loss, which listens to a teacher, and what validation says: how much of what is drafted would be accepted.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from datasets import Dataset
from pydantic import Field
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from specdecode.config import StrictModel
from specdecode.decoding.metrics import expected_length
from specdecode.training.acceptance import split_runs
from specdecode.training.checkpoints import save_checkpoint
from specdecode.training.losses import LossConfig, Teacher, acceptance, agreement, draft_losses
from specdecode.training.packing import UNSCORED
from specdecode.training.reporting import LoggingConfig

logger = logging.getLogger(__name__)

Speak = Callable[[PreTrainedModel, np.random.Generator], list[dict[str, Tensor]]]  # batches of the student's own words


class TrainingConfig(StrictModel):
    """How long, how fast, on what and where to."""

    output_dir: str
    num_train_steps: int = Field(default=50_000, gt=0)
    per_device_batch_size: int = Field(default=4, gt=0, description="blocks in a forward pass of each worker")
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    sequence_length: int = Field(default=1024, gt=1, description="tokens of a block")
    learning_rate: float = Field(default=1e-4, gt=0)
    min_learning_rate_ratio: float = Field(default=0.05, ge=0, le=1, description="where the cosine ends, of the highest rate")
    num_warmup_steps: int = Field(default=50, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    gradient_checkpointing: bool = Field(default=False, description="compute activations twice rather than keep them")
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    validate_every: int = Field(default=200, gt=0, description="steps between two validations, each with a checkpoint")
    log_every: int = Field(default=20, gt=0)
    num_validation_blocks: int = Field(default=64, gt=0, description="held-out blocks of each source at the most")
    K: int = Field(default=5, gt=0, description="tokens drafted in a round, for the expected accepted length")
    seed: int = 0
    num_workers: int = Field(default=1, ge=0, description="processes that train; 0 trains in the job's own, for a look")
    resources_per_worker: dict[str, float] = Field(default_factory=dict, description="what each asks of Ray, such as {CPU: 2}")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parallelism: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="of several workers: copies of the model, or on GPUs shares of it (FSDP2)"
    )
    max_failures: int = Field(default=3, ge=0, description="how often workers that are lost are started again")
    storage_path: str | None = Field(
        default=None, description="where checkpoints are, which all nodes see; output_dir if unset"
    )

    @property
    def num_blocks(self) -> int:
        """How many blocks the whole training reads."""
        return self.num_train_steps * self.per_device_batch_size * self.gradient_accumulation_steps * max(1, self.num_workers)


@dataclass(frozen=True)
class TrainingResult:
    """What a run took, and the figures of the validation of its best checkpoint: `loss`, `acceptance`, `accepted_length`."""

    num_steps: int
    best_step: int
    num_tokens: int
    time_s: float
    validation: dict[str, float]

    def summary(self) -> str:
        """One line for people."""
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.validation.items())
        return f"best checkpoint at step {self.best_step}: {figures}"


class Objective:
    """The loss of the student's forward pass: called by the model itself, so that wrappers of it see one forward pass.

    Attributes:
        teacher: what the teacher says at the scored places of the batch that comes next.
    """

    def __init__(self, config: LossConfig) -> None:
        self.teacher: Teacher | None = None
        self._config = config

    def __call__(
        self,
        logits: Tensor,  # [batch, length, vocab]
        labels: Tensor,  # [batch, length]
        vocab_size: int | None = None,  # noqa: ARG002  transformers' own losses ask for it
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> Tensor:
        """The sum over scored places, divided by how many the whole step has on all workers; by those of the batch if None."""
        is_scored = scored_places(labels)
        total = draft_losses(logits[:, :-1][is_scored], labels[:, 1:][is_scored], self.teacher, self._config).sum()
        count = is_scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / count


def scored_places(labels: Tensor) -> Tensor:
    """Which logits predict what is learned: labels [batch, length] -> bool [batch, length - 1]."""
    return labels[:, 1:] != UNSCORED


class DraftTrainer(transformers.Trainer):
    """Trains a student, with a teacher if there is one.

    Args:
        student: what is trained.
        teacher: a model that says what is right; None where the blocks say it themselves, or only the text counts.
        tokenizer: of both.
        loss: what is minimised.
        training, validation: blocks; `validation` has a column `group`.
        config: how.
        log: where figures go.
        vocab_size: how many tokens both models have, where the blocks hold what the teacher says.
        speak: makes batches of the student's own words, for the steps in `own_share`.
        own_share: how many of the steps, of 1, learn from those.
        asides: groups of `validation` whose figures are shown, and are no part of those of all.
        callbacks: are told of what happens.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        loss: LossConfig,
        training: Dataset,
        validation: Dataset,
        config: TrainingConfig,
        log: LoggingConfig,
        *,
        vocab_size: int | None = None,
        speak: Speak | None = None,
        own_share: float = 0.0,
        asides: frozenset[str] = frozenset(),
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self._objective = Objective(loss)
        student.loss_function = self._objective
        if config.gradient_checkpointing:
            (
                getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
            )()  # the newer name first
        self._loss = loss
        self._teacher = teacher
        self._config = config
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._speak = speak
        self._own_share = own_share
        self._asides = asides
        self._groups = sorted(set(validation["group"]))
        self._pace = Pace()
        if log.use_wandb:
            os.environ.setdefault("WANDB_PROJECT", log.project)  # which is how transformers takes it
        super().__init__(
            model=student,
            args=arguments(config, log),
            data_collator=Collator(self._groups),
            train_dataset=training,
            eval_dataset=validation,
            compute_metrics=self._figures,
            callbacks=[self._pace, ProgressLine(), *(callbacks or [])],
        )
        self.remove_callback(transformers.PrinterCallback)  # we have a line of our own
        if teacher is not None:
            _share(teacher) if self.is_fsdp_enabled else teacher.to(self.args.device)

    def run(self, checkpoint: Path | None) -> TrainingResult:
        """Trains to the end, from a checkpoint's place if there is one."""
        started = time.perf_counter()
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        best = self.state.best_global_step or 0
        figures = next(entry for entry in self.state.log_history if "eval_loss" in entry and entry["step"] == best)
        hidden = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
        return TrainingResult(
            num_steps=self.state.global_step,
            best_step=best,
            num_tokens=self._config.num_blocks * self._config.sequence_length,
            time_s=time.perf_counter() - started,
            validation={n.removeprefix("eval_"): v for n, v in figures.items() if n.startswith("eval_") and n not in hidden},
        )

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """See `Trainer.compute_loss`; the teacher speaks first."""
        inputs = dict(inputs)
        # Fine-tuning has no use for what the teacher says; validation always compares.
        self._objective.teacher = self._listen(inputs) if self._loss.needs_teacher or not model.training else None
        for name in ("group", "teacher_ids", "teacher_log_probs"):
            inputs.pop(name, None)
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **options)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """See `Trainer.get_batch_samples`; a share of the steps learns from the student's own words instead."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._speak is None or not batches:
            return batches, count
        rng = np.random.default_rng([self._config.seed, self.state.global_step])
        if rng.random() >= self._own_share:
            return batches, count
        own_rng = np.random.default_rng([self._config.seed, self.state.global_step, self.args.process_index])
        own = self._speak(self.accelerator.unwrap_model(self.model_wrapped), own_rng)[: len(batches)]
        return own, self._get_num_items_in_batch(own, device)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[None, tuple[Tensor, Tensor], Tensor]:
        """See `Trainer.prediction_step`; instead of logits, figures of each place, [batch, length, 3], and groups.

        The figures are the loss, the chance to be accepted, and whether the first choice is the teacher's. transformers' own
        loss would be averaged over batches, whose scored places are more or fewer, and of several groups.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, outputs = self.compute_loss(model, inputs, return_outputs=True)
        labels = inputs["labels"]
        figures = torch.full((*labels.shape, 3), torch.nan, device=labels.device)
        teacher, is_scored = self._objective.teacher, scored_places(labels)
        q_logits = outputs["logits"][:, :-1][is_scored]
        with torch.no_grad():
            figures[:, 1:, 0][is_scored] = draft_losses(q_logits, labels[:, 1:][is_scored], teacher, self._loss).float()
        if teacher is not None:
            temperature = self._loss.temperature if teacher.is_sparse else 1.0
            both = torch.stack(
                [acceptance(teacher, q_logits, temperature).float(), agreement(teacher, q_logits).float()], dim=-1
            )
            figures[:, 1:, 1:][is_scored] = both
        return None, (figures, inputs["group"]), labels

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """See `Trainer.evaluate`; keeps the model in OUTPUT_DIR/best if it is better than all before."""
        best = self.state.best_metric
        metrics: dict[str, float] = super().evaluate(*args, **options)
        if best is None or metrics["eval_loss"] < best:
            self._keep_best()
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """See `Trainer.log`; adds the tokens per second of all workers."""
        if "loss" in logs:
            steps_per_second = self._pace.measure(self.state.global_step)
            logs["tokens_per_second"] = (
                steps_per_second * self._config.num_blocks / self._config.num_train_steps * self._config.sequence_length
            )
        super().log(logs, *args, **options)

    def _listen(self, inputs: dict[str, Any]) -> Teacher | None:
        """What the teacher says at the scored places of a batch."""
        is_scored = scored_places(inputs["labels"])
        if "teacher_ids" in inputs:
            ids, log_probs = (inputs[name][:, 1:][is_scored] for name in ("teacher_ids", "teacher_log_probs"))
            return Teacher.sparse(ids, log_probs, self._loss.temperature, self._vocab_size)
        if self._teacher is None:
            return None
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = self._teacher(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
        teacher = Teacher.dense(logits[:, :-1][is_scored])
        return teacher if self._loss.top_k is None else teacher.restricted(self._loss.top_k, self._loss.temperature)

    def _figures(self, prediction: transformers.EvalPrediction) -> dict[str, float]:
        """Loss, acceptance, accepted length and agreement: of all, and of each group."""
        figures, groups = prediction.predictions
        rows = {name: groups == number for number, name in enumerate(self._groups)}
        counts = np.isin(groups, [number for number, name in enumerate(self._groups) if name not in self._asides])
        chosen = {"": counts} | ({f"{n}_": where for n, where in rows.items()} if len(rows) > 1 else {})
        return {
            f"{prefix}{name}": value
            for prefix, where in chosen.items()
            for name, value in self._summary(figures[where], prediction.label_ids[where]).items()
        }

    def _summary(self, figures: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        is_scored = labels != UNSCORED
        loss = {"loss": float(figures[is_scored, 0].mean())}
        if np.isnan(figures[is_scored, 1]).any():  # nobody to be accepted by
            return loss
        runs = [run for row, scored in zip(figures[..., 1], is_scored, strict=True) for run in split_runs(row, scored)]
        return loss | {
            "acceptance": float(figures[is_scored, 1].mean()),
            "accepted_length": expected_length(runs, self._config.K),
            "agreement": float(figures[is_scored, 2].mean()),
        }

    def _keep_best(self) -> None:
        """Writes OUTPUT_DIR/best, from the shares of all workers where the model is shared."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.is_world_process_zero():
            student = self.accelerator.unwrap_model(self.model_wrapped)
            replace_folder(
                Path(self._config.output_dir) / "best", lambda folder: save_checkpoint(student, self._tokenizer, folder, state)
            )


def _share(model: PreTrainedModel) -> None:
    """Gives each process a share of the model's weights, which are put together layer by layer when they are needed (FSDP2)."""
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)


def replace_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Lets `save` write a new `folder` beside the old one, then swaps them: a reader never meets half a checkpoint."""
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    save(new)
    if folder.exists():
        folder.replace(old)
    new.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


class Pace(TrainerCallback):
    """Measures steps per second, from the step on at which a training begins or goes on."""

    def __init__(self) -> None:
        self._last = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """See `TrainerCallback.on_train_begin`."""
        self._last = (state.global_step, time.perf_counter())

    def measure(self, step: int) -> float:
        """Since the last time."""
        (before, started), self._last = self._last, (step, time.perf_counter())
        return (step - before) / (self._last[1] - started)


class ProgressLine(TrainerCallback):
    """One line in the log for each set of figures."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:  # noqa: ARG002
        """See `TrainerCallback.on_log`."""
        if state.is_world_process_zero and logs:
            shown = {
                name: value
                for name, value in logs.items()
                if not name.endswith(("_runtime", "_per_second")) or "tokens" in name
            }
            figures = "  ".join(f"{name} {value:.5g}" for name, value in shown.items() if isinstance(value, (int, float)))
            logger.info("step %d of %d  %s", state.global_step, state.max_steps, figures)


class Collator:
    """Rows of blocks in, tensors out."""

    def __init__(self, groups: list[str]) -> None:
        self._groups = {name: number for number, name in enumerate(groups)}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Stacks the rows, [batch, length] each."""
        batch = {
            name: torch.tensor(np.array([row[name] for row in rows]), dtype=torch.long)
            for name in ("input_ids", "position_ids", "labels")
        }
        batch["group"] = torch.tensor([self._groups.get(row["group"], -1) for row in rows])
        if "teacher_ids" in rows[0]:
            shape = (len(rows), batch["labels"].shape[1], -1)
            for name, dtype in (("teacher_ids", torch.long), ("teacher_log_probs", torch.float32)):
                batch[name] = torch.tensor(np.array([row[name] for row in rows]), dtype=dtype).view(shape)
        return batch


def trainer_folder(config: TrainingConfig) -> str:
    """Where transformers keeps its checkpoints."""
    return str(Path(config.output_dir) / "trainer")


def arguments(config: TrainingConfig, log: LoggingConfig) -> TrainingArguments:
    """The configuration as transformers takes it."""
    reports = [name for name, wanted in (("tensorboard", log.use_tensorboard), ("wandb", log.use_wandb)) if wanted]
    return TrainingArguments(
        output_dir=trainer_folder(config),
        max_steps=config.num_train_steps,
        per_device_train_batch_size=config.per_device_batch_size,
        per_device_eval_batch_size=config.per_device_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_learning_rate_ratio},
        warmup_steps=config.num_warmup_steps,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=config.max_gradient_norm,
        bf16=config.precision == "bfloat16",
        use_cpu=config.device == "cpu" or not torch.cuda.is_available(),
        seed=config.seed,
        eval_strategy="steps",
        eval_steps=config.validate_every,
        save_strategy="steps",
        save_steps=config.validate_every,
        save_total_limit=2,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_steps=config.log_every,
        report_to=reports or "none",
        run_name=log.run_name,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        fsdp=config.parallelism == "fsdp" and config.num_workers > 1,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
    )
