"""The load test against our own server: every answer is counted as the server counts it, with a draft and without."""

from pathlib import Path

from specdecode.config import check_config, load_config
from specdecode.evaluation.load import read_load, run_load, write_load_summary
from specdecode.evaluation.load_plan import LoadConfig
from tests.serve.conftest import ROOT


def test_the_embedded_application_under_load(server_url: str, tmp_path: Path) -> None:
    small = ["max_tokens=12", "num_requests=4", "num_turns=2", "concurrency=[1,4]", "rates=[8.0]", "num_warmup=1"]
    told = [*small, f"url={server_url}/v1", f"output_dir={tmp_path}"]
    run_load(load_config(ROOT / "configs/tiny/load.yaml", LoadConfig, told))
    _, records = read_load(tmp_path)
    assert [record.error for record in records if record.error is not None] == []
    assert {record.num_tokens for record in records} == {12}
    assert all(record.started_s <= record.first_s <= record.ended_s for record in records)
    assert all(len(record.gaps_s) <= 12 for record in records)
    summary = write_load_summary(tmp_path)
    assert {row.arm for row in summary.rows} == {"plain", "speculative"}
    assert all(row.num_answers == 8 for row in summary.rows)
    assert len(summary.ratios) == 3


def test_random_token_ids_are_a_prompt(server_url: str, tmp_path: Path) -> None:
    values = {
        "url": f"{server_url}/v1",
        "model": "tiny",
        "random": {"min_tokens": 5, "max_tokens": 9},
        "max_tokens": 4,
        "concurrency": [2],
    }
    options = {"ignore_eos": True, "num_requests": 3, "num_turns": 2, "output_dir": str(tmp_path)}
    run_load(check_config(values | options, LoadConfig, "test"))
    lengths = {record.num_prompt_tokens for record in read_load(tmp_path)[1]}
    assert lengths <= set(range(5, 10))
    assert len(lengths) > 1
