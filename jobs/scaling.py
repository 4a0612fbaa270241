"""Compares one node with several: `python -m jobs.scaling --config configs/tiny/scaling.yaml [--set key=value ...]`.

Each node is a Ray node of its own on this machine, and has one of its cores. The job that is compared runs as its users start
it, with one actor for each node, in turns with one node and with more. What counts is the time between its first part and its
last: before that Ray starts and models load. To be run on an idle machine with as many cores as there are nodes.
"""

import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import environ
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from rich.table import Table

from jobs.command import as_text, run_job
from specdecode.config import StrictModel
from specdecode.errors import ConfigError

_STORE_BYTES = 200 << 20


class ScalingConfig(StrictModel):
    """Which job is compared, on how many nodes."""

    job: Literal["benchmark", "collect_router_data"] = Field(description="of jobs/")
    config: str = Field(description="its configuration file")
    overrides: list[str] = Field(default=[], description="keys of the file that are to be another, as KEY=VALUE")
    num_nodes: list[int] = Field(default=[1, 2], min_length=2, description="compared with the first of them")
    num_repeats: int = Field(default=3, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "ScalingConfig":
        if min(self.num_nodes) < 1:
            raise ValueError(f"num_nodes: expected numbers of at least 1, got {self.num_nodes}")
        return self


@dataclass(frozen=True)
class Run:
    """One run of the job: its parts in a second once the first was there, and what it took in all."""

    num_nodes: int
    parts_per_second: float
    seconds: float


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("scaling", "Compare one node with several.", ScalingConfig, _run, arguments)


def _run(config: ScalingConfig) -> str:
    return as_text(table(config, list(measure(config))))


def measure(config: ScalingConfig) -> Iterator[Run]:
    """Runs the job again and again, with each number of nodes in turns.

    Raises:
        ConfigError: the job does not run, or has fewer parts than two for each node.
    """
    for _ in range(config.num_repeats):
        for count in config.num_nodes:
            with tempfile.TemporaryDirectory() as folder, _nodes(count) as address:
                seconds = _job(config, count, Path(folder), address)
                yield Run(count, _pace(Path(folder), count), seconds)


def table(config: ScalingConfig, runs: list[Run]) -> Table:
    """Medians, and how they compare with those of the first number of nodes."""
    shown = Table(title=f"jobs.{config.job} --config {config.config}: medians of {config.num_repeats}")
    for heading in ("nodes", "parts/s", "speed-up", "whole job s"):
        shown.add_column(heading, justify="right")
    paces = {count: [run.parts_per_second for run in runs if run.num_nodes == count] for count in config.num_nodes}
    first = paces[config.num_nodes[0]]
    for count, mine in paces.items():
        ratios = [pace / other for pace, other in zip(mine, first, strict=True)]
        seconds = statistics.median(run.seconds for run in runs if run.num_nodes == count)
        shown.add_row(str(count), f"{statistics.median(mine):.3f}", f"{statistics.median(ratios):.2f}x", f"{seconds:.1f}")
    return shown


@contextmanager
def _nodes(count: int) -> Iterator[str]:
    """Nodes of one CPU each, on loopback, which only the holder of a new token reaches; yields the head's address."""
    from ray.cluster_utils import Cluster  # after the token is set: Ray reads it when it is imported

    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": _STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(**options)
        yield cluster.address
    finally:
        cluster.shutdown()


def _job(config: ScalingConfig, count: int, folder: Path, address: str) -> float:
    """Runs the job with an actor for each node; returns the seconds that it took."""
    where = {
        "benchmark": [f"output_dir={folder}/results"],
        "collect_router_data": [f"output={folder}/records.json", f"parts_dir={folder}/parts"],
    }[config.job]
    keys = [*config.overrides, f"num_actors={count}", "num_cpus=1", *where]
    command = [sys.executable, "-m", f"jobs.{config.job}", "--config", config.config]
    command += [word for key in keys for word in ("--set", key)]
    started = time.perf_counter()
    ended = subprocess.run(
        command, env={**environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise ConfigError(f"jobs.{config.job} ended with status {ended.returncode}: {ended.stderr.strip()[-500:]}")
    return time.perf_counter() - started


def _pace(folder: Path, count: int) -> float:
    """Parts in a second, from when each node can have done one to the last."""
    times = sorted(path.stat().st_mtime for path in folder.rglob("part-*.parquet"))
    if len(times) < 2 * count:
        raise ConfigError(f"config: expected a job of at least {2 * count} parts for {count} nodes, got {len(times)}")
    return (len(times) - count) / max(1e-3, times[-1] - times[count - 1])


if __name__ == "__main__":
    environ["RAY_AUTH_MODE"], environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(16)
    sys.exit(main())
