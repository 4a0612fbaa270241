"""Trains a target from scratch on Ray: `python -m jobs.train_target --config configs/tiny/pretrain_target.yaml [--resume]`."""

from jobs.training import Run, is_begun, report  # isort: skip  # before all else that imports Ray

import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.command import run_job
from jobs.reading import read
from specdecode.config import check_config
from specdecode.training.checkpoints import load_tokenizer
from specdecode.training.data import TRAINING, VALIDATION, training_blocks, validation_blocks, write_blocks
from specdecode.training.examples import end_of_text
from specdecode.training.target import TargetTrainingConfig, learn_target
from specdecode.training.trainer import TrainingResult


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("train_target", "Train a target from scratch.", TargetTrainingConfig, _run, arguments, can_resume=True)


def _run(config: TargetTrainingConfig, resume: bool) -> str:
    return train_target(config, resume=resume).summary()


def train_target(config: TargetTrainingConfig, *, resume: bool = False) -> TrainingResult:
    """Trains a target; starts a local Ray unless this process is connected to one. See `jobs.train_draft`."""
    run = Run(config, config.training, resume=resume)
    config.logging.check()
    load_tokenizer(config.tokenizer)
    return run.train(partial(prepare, config), _work)


def prepare(config: TargetTrainingConfig) -> Path:
    """Makes the blocks that are learned from and validated on, unless they are there; returns their folder."""
    training = config.training
    folder = Path(training.output_dir) / "data"
    if is_begun(folder.parent):
        return folder
    reading = read(config.data, config.tokenizer, max_tokens=training.num_blocks * training.sequence_length)
    pad_id = end_of_text(load_tokenizer(config.tokenizer))
    blocks = training_blocks(reading.training, config.data.weights, training.sequence_length, pad_id, training.seed)
    write_blocks(folder / TRAINING, [("training", islice(blocks, training.num_blocks))])
    validation = validation_blocks(
        reading.held_out, training.num_validation_blocks, training.sequence_length, pad_id, training.seed
    )
    write_blocks(folder / VALIDATION, validation.items())
    return folder


def _work(told: dict[str, Any]) -> None:
    config = check_config(told["config"], TargetTrainingConfig, where="train_target")
    report(told, config.training, partial(learn_target, config, Path(told["blocks"])))


if __name__ == "__main__":
    sys.exit(main())
