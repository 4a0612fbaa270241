"""Publishes a trained family, with model cards: `python -m jobs.release --config configs/tiny/train_release.yaml`."""

import sys

from jobs.command import run_job
from specdecode.training.release import ReleaseConfig, release


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("release", "Measure and publish a model family.", ReleaseConfig, _run, arguments)


def _run(config: ReleaseConfig) -> str:
    return release(config).as_markdown()


if __name__ == "__main__":
    sys.exit(main())
