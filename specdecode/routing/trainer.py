"""Records in, a router and a report on prompts that it has not seen out. transformers' `Trainer` does the work."""

import logging
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  as everyone calls it
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments

from specdecode.chance import chance
from specdecode.config import StrictModel
from specdecode.errors import ConfigError
from specdecode.routing.examples import Examples, arms_of, gather
from specdecode.routing.features import DEFAULT_ENCODER, Features
from specdecode.routing.model import FARTHEST, About, AcceptanceModel
from specdecode.routing.records import Record, read_records
from specdecode.routing.report import Report, report

logger = logging.getLogger(__name__)


class RouterTrainingConfig(StrictModel):
    """Everything about the training of a router."""

    records: list[str] = Field(min_length=1, description="files or folders of records, as jobs.collect_router_data makes them")
    test_records: list[str] = Field(default=[], description="others to report on; a share of the records if there are none")
    output_dir: str
    encoder: str = DEFAULT_ENCODER
    device: str | None = Field(default=None, description="of the encoder, such as cpu or cuda; the best there is if unset")
    hidden_size: int = Field(default=128, gt=0)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    batch_size: int = Field(default=64, gt=0)
    num_epochs: int = Field(default=100, gt=0, description="at the most")
    patience: int = Field(default=10, gt=0, description="epochs without a better validation loss, after which it ends")
    validation_share: float = Field(default=0.15, gt=0, lt=1, description="of the prompts, to know when to end")
    test_share: float = Field(default=0.15, gt=0, lt=1, description="of the prompts, to report on, without test_records")
    seed: int = 0


def train_router(config: RouterTrainingConfig) -> Report:
    """Trains a router into OUTPUT_DIR; returns the report on test prompts.

    Raises:
        ConfigError: the records are not there, are of fewer than two drafts, or are too few.
        ModelError: the encoder does not load.
    """
    records = [record for path in config.records for record in read_records(path)]
    arms = arms_of(records)
    others = [record for path in config.test_records for record in read_records(path)]
    if others and arms_of(others) != arms:
        raise ConfigError(f"test_records: expected records of the arms {arms}, got {arms_of(others)}")
    records = _without_prompts_of(others, records)
    features = Features(config.encoder, device=config.device)
    known = gather(records, arms, features)
    parts = _split(known, config, has_test=not others)
    test = gather(others, arms, features) if others else known.chosen(parts[2])
    training, validation = known.chosen(parts[0]), known.chosen(parts[1])
    for name, part in (("learn from", training), ("validate on", validation), ("report on", test)):
        if not len(part):
            raise ConfigError(f"records: expected prompts to {name}, got none of {len(known)}")
    if not any(trial.arms.keys() >= set(arms) for trial in test.trials):
        raise ConfigError(f"records: expected prompts to report on that each of {arms} was tried on, got none of {len(test)}")
    network = _fit(training, validation, config)
    tensors = _calibrated(network, validation)
    names = features.names
    model = AcceptanceModel(About(arms, config.encoder, names, _weights(tensors, validation), {}), tensors)
    found = report(model, training.trials, training.features, test.trials, test.features, config.seed)
    about = About(arms, config.encoder, names, model.about.weights, {"config": config.model_dump(), "report": asdict(found)})
    AcceptanceModel(about, tensors).save(Path(config.output_dir))
    return found


def _without_prompts_of(others: list[Record], records: list[Record]) -> list[Record]:
    """The records of prompts that are not reported on: two conversations may end with the same message."""
    asked = {record.prompt for record in others}
    kept = [record for record in records if record.prompt not in asked]
    if not kept:
        raise ConfigError("records: expected prompts that are not in test_records too, got none")
    if len(kept) < len(records):
        logger.info("%d records are of prompts that are reported on, and not learned from", len(records) - len(kept))
    return kept


def _split(examples: Examples, config: RouterTrainingConfig, *, has_test: bool) -> tuple[list[int], list[int], list[int]]:
    """Places to learn from, to validate on and to report on: a function of each prompt's text."""
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    test_share = config.test_share if has_test else 0.0
    for place, trial in enumerate(examples.trials):
        drawn = chance(f"{config.seed}:{trial.prompt}")
        parts[2 if drawn < test_share else 1 if drawn < test_share + config.validation_share else 0].append(place)
    return parts


class Network(nn.Module):
    """The perceptron that is trained; see `AcceptanceModel` for what is kept of it."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, hidden_size: int, num_arms: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.hidden = nn.Linear(len(mean), hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_size, num_arms)

    def forward(self, features: Tensor, acceptance: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """The binary cross-entropy of acceptance as a chance, [batch, arms], weighted; 0 where nothing is known."""
        standardised = ((features - self.mean) / self.scale).clamp(-FARTHEST, FARTHEST)
        hidden = torch.relu(self.hidden(standardised))
        logits = self.output(self.dropout(hidden))
        losses = F.binary_cross_entropy_with_logits(logits, acceptance, weight, reduction="sum")
        return {"loss": losses / weight.sum().clamp(min=1e-6), "logits": logits}


def _fit(training: Examples, validation: Examples, config: RouterTrainingConfig) -> Network:
    torch.manual_seed(config.seed)
    mean, scale = training.features.mean(0), training.features.std(0)
    scale[scale < 1e-4] = np.inf  # what never differed tells nothing, and must not when it does one day
    network = Network(
        torch.from_numpy(mean), torch.from_numpy(scale), config.hidden_size, training.acceptance.shape[1], config.dropout
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=network,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=config.num_epochs,
                per_device_train_batch_size=config.batch_size,
                per_device_eval_batch_size=1024,
                learning_rate=config.learning_rate,
                weight_decay=config.weight_decay,
                eval_strategy="epoch",
                save_strategy="epoch",
                save_total_limit=1,
                load_best_model_at_end=True,
                metric_for_best_model="eval_loss",
                label_names=["acceptance"],
                use_cpu=True,
                seed=config.seed,
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
            ),
            train_dataset=_dataset(training),
            eval_dataset=_dataset(validation),
            callbacks=[EarlyStoppingCallback(config.patience)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logger.info("best validation loss %.4f, after %d epochs", trainer.state.best_metric, round(trainer.state.epoch or 0))
    return network.eval()


def _dataset(examples: Examples) -> Dataset:
    """What is counted on more verdicts weighs more, up to a point: prompts differ by more than chance."""
    weight = examples.num_verdicts / (examples.num_verdicts + 16.0)
    columns = {"features": examples.features, "acceptance": np.nan_to_num(examples.acceptance), "weight": weight}
    return Dataset.from_dict({name: values.astype(np.float32) for name, values in columns.items()}).with_format("torch")


def _calibrated(network: Network, validation: Examples) -> dict[str, np.ndarray]:
    """The network's tensors, with the factor and shift of each arm's logit that fit the validation prompts (Platt 1999)."""
    tensors = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    dataset = _dataset(validation)[:]
    with torch.no_grad():
        logits = network(**dataset)["logits"]
    factors = torch.ones(logits.shape[1], 2)
    factors[:, 1] = 0
    factors.requires_grad_()
    optimizer = torch.optim.LBFGS([factors], max_iter=100)
    start = factors.detach().clone()

    def loss() -> Tensor:
        optimizer.zero_grad()
        corrected = logits * factors[:, 0] + factors[:, 1]
        total = F.binary_cross_entropy_with_logits(corrected, dataset["acceptance"], dataset["weight"], reduction="sum")
        total = total + (factors - start).square().sum()  # few prompts must not turn it round
        total.backward()
        return total

    optimizer.step(loss)
    return tensors | {"calibration": factors.detach().numpy()}


def _weights(tensors: dict[str, np.ndarray], validation: Examples) -> list[float]:
    """How many verdicts a forecast is worth, for each arm: of a beta distribution whose variance is the mean squared error.

    var = a (1 - a) / (w + 1), so w = mean a (1 - a) / mean error^2 - 1.
    """
    model = AcceptanceModel(About([], "", [], [], {}), tensors)
    expected = model.predict(validation.features)
    error = np.nanmean((expected - validation.acceptance) ** 2, axis=0)
    spread = np.nanmean(np.where(np.isnan(validation.acceptance), np.nan, expected * (1 - expected)), axis=0)
    return [float(value) for value in np.clip(spread / np.maximum(error, 1e-6) - 1, 1.0, 50.0)]
