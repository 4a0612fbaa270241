"""The commands that measure serving print what they promise; how fast anything is, is not a test's business."""

import os
import re
import socket
import subprocess
import sys

from specdecode.evaluation.remote import RemoteConfig, measure_remote, summarise
from tests.serve.conftest import ROOT


def run(*arguments: str) -> list[list[str]]:
    """The rows of the table that a command prints, cell by cell."""
    command = [sys.executable, "-m", "specdecode.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_draft_elsewhere_and_one_that_runs_ahead_give_the_plain_answers() -> None:
    config = RemoteConfig(batches=[1, 2], num_repeats=1, max_tokens=48)
    rows = summarise(list(measure_remote(config)), config.temperature)
    assert [(row.arm, row.batch) for row in rows] == [
        (arm, batch) for batch in (1, 2) for arm in ("plain", "local", "remote", "run ahead")
    ]
    assert not any(row.num_different for row in rows)
    local, remote, ahead = rows[1:4]
    assert local.acceptance_rate == remote.acceptance_rate > 0
    assert local.exchange_ms == local.ahead_rate == remote.ahead_rate == 0 < remote.exchange_ms
    assert ahead.ahead_rate > 0


def test_every_way_to_a_draft_is_measured() -> None:
    rows = run("exchange", "--set", "batches=[1]", "--set", "num_rounds=3", "--set", "num_warmup_rounds=1")
    ways = {row[0]: [float(cell) for cell in row[1:]] for row in rows if row[0] in ("in process", "tcp", "handle")}
    assert ways.keys() == {"in process", "tcp", "handle"}
    for batch, p50, p90, p99, work in ways.values():
        assert batch == 1
        assert 0 < p50 <= p90 <= p99
        assert work > 0


def test_streams_are_compared_with_the_engine() -> None:
    options = [f"port={free_port()}", "concurrency=[2]", "num_repeats=1", "max_tokens=6"]
    rows = run("http", *(part for option in options for part in ("--set", option)))
    sides = {row[0]: row[1:] for row in rows if row[0] in ("engine", "http")}
    assert sides.keys() == {"engine", "http"}
    assert sides["engine"][0] == sides["http"][0] == "2"
    assert sides["engine"][2] == "1.00x"


def test_what_a_router_adds_is_measured(checkpoint: str) -> None:
    options = [f"routing.checkpoint={checkpoint}", "concurrency=[1,8]", "num_requests=40"]
    rows = run("routing", *(part for option in options for part in ("--set", option)))
    figures = {row[0]: [float(cell) for cell in row[1:]] for row in rows if row[0] in ("1", "8")}
    assert figures.keys() == {"1", "8"}
    for p50, p99, first_token in figures.values():
        assert 0 < p50 <= p99
        assert first_token > 0


def test_a_draft_that_the_engine_cannot_have_is_refused() -> None:
    command = [sys.executable, "-m", "specdecode.cli", "http", "--set", "draft=code"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "draft: expected a local draft model of configs/tiny/serve.yaml, or none, got 'code'" in done.stderr
