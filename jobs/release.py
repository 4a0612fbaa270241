"""Publishes a trained family, with model cards: `python -m jobs.release --config configs/tiny/release.yaml`."""

import sys

from jobs.command import run_job
from jobs.compare_drafts import as_table
from specdecode.training.release import ReleaseConfig, release


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("release", "Compare and publish a model family.", ReleaseConfig, _run, arguments)


def _run(config: ReleaseConfig) -> str:
    return as_table(config.comparison, release(config))


if __name__ == "__main__":
    sys.exit(main())
