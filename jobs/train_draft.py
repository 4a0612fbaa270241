"""Trains a draft: `python -m jobs.train_draft --config configs/tiny/distill_code.yaml [--set key=value ...]`."""

import sys

from jobs.command import run_job
from specdecode.training.draft import DraftTrainingConfig, train_draft


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("train_draft", "Distil or fine-tune a draft model.", DraftTrainingConfig, _run, arguments)


def _run(config: DraftTrainingConfig) -> str:
    return train_draft(config).summary()


if __name__ == "__main__":
    sys.exit(main())
