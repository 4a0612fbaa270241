"""The benchmark as a job: over processes, stopped by force at any moment and gone on with, every record is there once."""

import random
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from jobs.benchmark import main as benchmark
from specdecode.evaluation.benchmark import RECORDS, SUMMARY, read_run
from specdecode.evaluation.suite import cells
from tests.killing import kill_once, run_whole


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Thirty-two parts."""
    values = {
        "target": {"model": "tiny/target"},
        "generic_draft": "tiny/draft-generic",
        "datasets": [{"name": "code", "limit": 16}, {"name": "chat", "limit": 16}],
        "experiments": ["baseline", "generic_draft"],
        "max_new_tokens": 24,
        "output_dir": str(tmp_path / "results"),
        "part": 1,
        "num_actors": 2,
        "num_cpus": 0.5,
        "num_threads": 1,
    }
    path = tmp_path / "benchmark.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_benchmark_that_is_killed_three_times_goes_on_and_has_each_record_once(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.benchmark", "--config", str(config)]
    begun: dict[Path, int] = {}

    def found() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / RECORDS).glob("part-*.parquet")}

    def is_under_way() -> bool:
        """Some part more is there, and a while of up to a second has gone by."""
        there = len(found()) > len(begun)
        if there:
            time.sleep(random.random())
        return there

    for _ in range(3):
        kill_once(is_under_way, command, tmp_path / "log.txt")
        now = found()
        assert now.items() >= begun.items()
        begun = now

    assert "64 records, 0 of them failures" in run_whole(command)
    assert (tmp_path / "results" / SUMMARY).exists()
    read_config, _, records = read_run(tmp_path / "results")
    counts = Counter((record.experiment, record.question) for record in records)
    assert set(counts.values()) == {1}
    assert len(counts) == 32 * len(cells(read_config))
    plain = {record.question: record.tokens for record in records if record.experiment == "baseline"}
    assert all(record.tokens == plain[record.question] for record in records)
    assert found().items() >= begun.items()


def test_a_mistake_is_one_line(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(["--config", str(config), "--set", "experiments=[baseline, ablation_K]"]) == 2
    error = capsys.readouterr().err
    assert "draft_models: expected drafts, for ablation_K" in error
    assert len(error.splitlines()) == 1
