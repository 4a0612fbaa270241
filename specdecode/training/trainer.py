"""A model, batches and a loss in; the best checkpoint by validation loss out. Knows nothing of where batches come from."""

import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from specdecode.config import StrictModel
from specdecode.training.blocks import Batch
from specdecode.training.reporting import Report, log

Loss = Callable[[Batch], Tensor]  # the mean over the scored positions
Save = Callable[[Path], None]  # writes a checkpoint into the folder


class TrainingConfig(StrictModel):
    """How long, how fast and where to."""

    output_dir: str
    num_train_steps: int = Field(gt=0)
    per_device_batch_size: int = Field(gt=0)
    sequence_length: int = Field(default=512, gt=1)
    learning_rate: float = Field(gt=0)
    min_learning_rate_ratio: float = Field(default=0.05, ge=0, le=1)
    num_warmup_steps: int = Field(default=50, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    validate_every: int = Field(default=200, gt=0)
    log_every: int = Field(default=20, gt=0)
    num_validation_batches: int = Field(default=4, gt=0)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0


@dataclass(frozen=True)
class TrainingResult:
    """What a run took, and the validation losses of its best checkpoint by name, with their mean under `mean`."""

    num_steps: int
    best_step: int
    num_tokens: int
    time_s: float
    validation_losses: dict[str, float]

    def summary(self) -> str:
        """One line for people."""
        losses = ", ".join(f"{name} {loss:.4f}" for name, loss in self.validation_losses.items())
        return f"best checkpoint at step {self.best_step}: validation loss {losses}"


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Iterator[Batch],
    validation: dict[str, list[Batch]],
    config: TrainingConfig,
    save: Save,
    report: Report = log,
) -> TrainingResult:
    """Trains `model` in place for `num_train_steps` and keeps the best checkpoint in OUTPUT_DIR/best.

    `validation` maps a name, such as a domain, to its batches. The best checkpoint is the one with the lowest mean over
    the names.
    """
    optimizer = torch.optim.AdamW(_parameter_groups(model, config), betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    best, best_step = {"mean": math.inf}, 0
    started, num_tokens = time.perf_counter(), 0
    model.train()
    for step, batch in enumerate(itertools.islice(batches, config.num_train_steps), start=1):
        value = _update(model, loss, batch, optimizer, config)
        schedule.step()
        num_tokens += int(batch.is_scored.sum())
        if step % config.log_every == 0:
            rate = num_tokens / (time.perf_counter() - started)
            report(step, {"loss": value.item(), "tokens_per_second": rate})
        if step % config.validate_every == 0 or step == config.num_train_steps:
            losses = validate(model, loss, validation, config)
            report(step, {f"validation/{name}": value for name, value in losses.items()})
            if losses["mean"] < best["mean"]:
                best, best_step = losses, step
                replace_folder(Path(config.output_dir) / "best", save)
    return TrainingResult(config.num_train_steps, best_step, num_tokens, time.perf_counter() - started, best)


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Linear warm-up to 1, then half a cosine down to `min_learning_rate_ratio`."""
    if step < config.num_warmup_steps:
        return (step + 1) / config.num_warmup_steps
    progress = (step - config.num_warmup_steps) / max(1, config.num_train_steps - config.num_warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.min_learning_rate_ratio + (1 - config.min_learning_rate_ratio) * cosine


def validate(model: nn.Module, loss: Loss, validation: dict[str, list[Batch]], config: TrainingConfig) -> dict[str, float]:
    """The mean loss of each name's batches, and under `mean` the mean over the names."""
    model.eval()
    with torch.no_grad(), _autocast(config):
        losses = {name: sum(loss(batch).item() for batch in batches) / len(batches) for name, batches in validation.items()}
    model.train()
    return losses | {"mean": sum(losses.values()) / len(losses)}


def replace_folder(folder: Path, save: Save) -> None:
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


def _update(model: nn.Module, loss: Loss, batch: Batch, optimizer: torch.optim.Optimizer, config: TrainingConfig) -> Tensor:
    with _autocast(config):
        value = loss(batch)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.detach()


def _parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict[str, object]]:
    """Weight decay for matrices only, not for norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "lr": config.learning_rate, "weight_decay": 0.0},
    ]


def _autocast(config: TrainingConfig) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bfloat16")
