"""Trains a tokenizer: `python -m jobs.train_tokenizer --config configs/tiny/tokenizer.yaml [--set key=value ...]`."""

import sys

from jobs.command import run_job
from specdecode.training.tokenizer import TokenizerConfig, train_tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("train_tokenizer", "Train a byte-level tokenizer.", TokenizerConfig, _run, arguments)


def _run(config: TokenizerConfig) -> str:
    return f"tokenizer saved in {train_tokenizer(config)}"


if __name__ == "__main__":
    sys.exit(main())
