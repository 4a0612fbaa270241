"""Trains a target from scratch: `python -m jobs.train_target --config configs/tiny/pretrain_target.yaml`."""

import sys

from jobs.command import run_job
from specdecode.training.target import TargetTrainingConfig, train_target


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("train_target", "Train a small target model.", TargetTrainingConfig, _run, arguments)


def _run(config: TargetTrainingConfig) -> str:
    return train_target(config).summary()


if __name__ == "__main__":
    sys.exit(main())
