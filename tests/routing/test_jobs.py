"""The router's jobs as they are started: collection over processes, stopped by force and gone on with, and training."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from jobs.collect_router_data import CollectionConfig
from jobs.collect_router_data import _prompts as collected_prompts
from jobs.collect_router_data import main as collect
from jobs.train_router import main as train
from specdecode.routing.records import NONE, read_records, write_records
from tests.killing import kill_once, run_whole
from tests.routing.made import made_records

DRAFTS = ("code", "chat", "reasoning")
MESSAGE = "What should we eat in town tonight, number {}?"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A collection of 24 prompts in 6 parts."""
    rows = [{"prompt": MESSAGE.format(number)} for number in range(8)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    values = {
        "router": {"draft_models": {name: f"tiny/draft-{name}" for name in DRAFTS}},
        "target": {"model": "tiny/target"},
        "mode": "decode",
        "K": 3,
        "max_new_tokens": 16,
        "prompts": {
            "code": [{"builtin": "code", "num_prompts": 8}],
            "chat": [{"file": str(tmp_path / "own.jsonl")}],
            "reasoning": [{"builtin": "reasoning", "num_prompts": 8}],
        },
        "output": str(tmp_path / "records.json"),
        "parts_dir": str(tmp_path / "parts"),
        "part": 4,
        "num_cpus": 0.5,
    }
    path = tmp_path / "collect.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_collection_that_is_killed_goes_on_and_has_each_record_once(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.collect_router_data", "--config", str(config)]
    parts = tmp_path / "parts"
    kill_once(lambda: len(list(parts.glob("*.parquet"))) >= 2, command, tmp_path / "log.txt")
    assert not (tmp_path / "records.json").exists()
    begun = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.parquet")}

    assert "96 records of 24 prompts" in run_whole(command)
    records = read_records(tmp_path / "records.json")
    assert set(Counter((record.prompt_id, record.arm) for record in records).values()) == {1}
    assert len(records) == 24 * 4
    assert {record.arm for record in records} == {*DRAFTS, NONE}
    assert all(record.error is None for record in records)
    assert {record.prompt for record in records if record.domain == "chat"} == {MESSAGE.format(n) for n in range(8)}
    assert all(path.stat().st_mtime_ns == when for path, when in begun.items())


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["router.draft_models={code: tiny/draft-code}"], "expected at least two drafts"),
        (["prompts={code: [{file: missing.jsonl}]}"], "missing.jsonl cannot be read"),
        (["prompts={code: [{builtin: code, file: x}]}"], "expected one of builtin, file and sources"),
        (["prompts={code: [{sources: {gsm8k: 1.0}}]}"], "num_prompts: expected with sources"),
        (["prompts={code: [{sources: {gsm8k: 1.0}, num_prompts: 2, data_dir: nowhere}]}"], "does not exist"),
    ],
)
def test_a_mistake_is_one_line_before_any_model_is_loaded(
    config: Path, capsys: pytest.CaptureFixture[str], sets: list[str], message: str
) -> None:
    assert collect(["--config", str(config), *(word for value in sets for word in ("--set", value))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_line_without_a_prompt_is_named(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    assert collect(["--config", str(config)]) == 2
    assert "own.jsonl, line 2: expected JSON with prompt" in capsys.readouterr().err


def test_a_router_is_trained_from_its_file(encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made.parquet"
    write_records(made, made_records(90))
    path = tmp_path / "train.yaml"
    path.write_text(f"records: [{made}]\noutput_dir: {tmp_path / 'router'}\nencoder: {encoder}\ndevice: cpu\nnum_epochs: 3\n")
    assert train(["--config", str(path)]) == 0
    table = capsys.readouterr().out
    for word in ("adaptive", "oracle", "centroid", "random", "always code", "always none", "reasoning"):
        assert word in table
    assert train(["--config", str(path), "--set", "records=[missing.json]"]) == 2
    assert "missing.json: cannot be read as records" in capsys.readouterr().err


def test_outliers_are_made_of_prompts_of_sources(config: Path) -> None:
    values = yaml.safe_load(config.read_text())
    source = {"sources": {"standard_library": 1.0}, "num_prompts": 30, "max_prompt_length": 400}
    values["prompts"] = {"plain": [source], "odd": [source | {"outliers": True}]}
    prompts = list(collected_prompts(CollectionConfig(**values)))
    assert prompts == list(collected_prompts(CollectionConfig(**values)))
    plain, odd = ({p.text for p in prompts if p.domain == domain} for domain in ("plain", "odd"))
    assert len(odd) > 20
    assert not plain & odd
    assert {p.is_chat for p in prompts if p.domain == "odd"} == {True, False}


def test_outliers_of_no_sources_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(config.read_text())
    values["prompts"]["code"] = [{"builtin": "code", "outliers": True}]
    config.write_text(yaml.safe_dump(values))
    assert collect(["--config", str(config)]) == 2
    assert "outliers: expected with sources" in capsys.readouterr().err
