"""Runs the benchmark on a cluster: `python -m jobs.benchmark --config configs/tiny/benchmark.yaml [--set key=value ...]`.

The same configuration as for `specdecode benchmark`, and the same records. Stopped, and started again, it goes on where it was.
"""

from serve.cluster import connected  # isort: skip  # before all else that imports Ray

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from jobs.command import run_job
from specdecode.evaluation.benchmark import REPORT, conclude, run_benchmark
from specdecode.evaluation.runner import Runner
from specdecode.evaluation.suite import BenchmarkConfig


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("benchmark", "Compare ways to decode.", BenchmarkConfig, _run, arguments)


def _run(config: BenchmarkConfig) -> str:
    records = run_benchmark(config, _measure)
    conclude(config.output_dir, config.report, config.logging)
    num_errors = sum(record.error is not None for record in records)
    report = f"; the report is {config.output_dir}/{REPORT}" if config.report else ""
    return f"{len(records)} records, {num_errors} of them failures, are in {config.output_dir}{report}"


def _measure(config: BenchmarkConfig, folder: Path, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Parts on actors, each of which holds all models."""
    with connected(quiet=False, dashboard=True):
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Runner,
            fn_constructor_kwargs={"config": config.model_dump(), "folder": str(folder)},
            compute=ray.data.ActorPoolStrategy(size=min(config.num_actors, len(rows))),
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus or None,
        )
        yield from done.iter_rows()


if __name__ == "__main__":
    sys.exit(main())
