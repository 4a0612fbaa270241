"""One node is compared with several as users would run them, and what cannot be compared is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.scaling import Run, ScalingConfig, main, table
from specdecode.config import check_config
from specdecode.errors import ConfigError
from tests.killing import ROOT, environment

COLLECTION = {
    "router": {"draft_models": {"code": "tiny/draft-code", "chat": "tiny/draft-chat"}},
    "target": {"model": "tiny/target"},
    "max_new_tokens": 4,
    "prompts": {"code": [{"builtin": "code", "num_prompts": 8}]},
    "part": 2,
}


def written(tmp_path: Path, **values: object) -> str:
    (tmp_path / "collect.yaml").write_text(yaml.safe_dump(COLLECTION))
    (tmp_path / "scaling.yaml").write_text(
        yaml.safe_dump({"job": "collect_router_data", "config": str(tmp_path / "collect.yaml"), "num_repeats": 1, **values})
    )
    return str(tmp_path / "scaling.yaml")


def test_a_job_runs_on_one_node_and_on_two(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.scaling", "--config", written(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = [line.split("│") for line in ended.stdout.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["1", "2"]
    assert all(float(row[2]) > 0 for row in rows)
    assert rows[0][3].strip() == "1.00x"


def test_nodes_are_compared_pair_by_pair() -> None:
    config = check_config({"job": "benchmark", "config": "some.yaml", "num_repeats": 3}, ScalingConfig, where="test")
    runs = [Run(1, 1.0, 50), Run(2, 2.0, 40), Run(1, 4.0, 20), Run(2, 2.0, 40), Run(1, 1.0, 50), Run(2, 1.5, 45)]
    shown = table(config, runs)
    assert list(shown.columns[1].cells) == ["1.000", "2.000"]
    assert list(shown.columns[2].cells) == ["1.00x", "1.50x"]  # of 2, 0.5 and 1.5; not 2.0, of the medians
    assert list(shown.columns[3].cells) == ["50.0", "40.0"]


def test_what_cannot_be_compared_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="num_nodes"):
        check_config({"job": "benchmark", "config": "some.yaml", "num_nodes": [0, 1]}, ScalingConfig, where="test")
    assert main(["--config", written(tmp_path, job="soak")]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "job" in line
    assert "RAY_AUTH_TOKEN" not in os.environ
