"""`specdecode evaluate` and what a user meets who has made a mistake, before any model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.benchmark import main as benchmark_job
from specdecode.cli import main
from specdecode.evaluation.benchmark import RECORDS
from specdecode.parts import Parts
from tests.evaluation.test_datasets import ALPACA, GSM8K, HUMANEVAL, MT_BENCH, read

QUICK = "configs/tiny/eval_quick.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two data sets, and models that are nowhere."""
    read(tmp_path, "humaneval", [HUMANEVAL], "code.jsonl")
    read(tmp_path, "gsm8k", [GSM8K], "sums.jsonl")
    values = {
        "target": {"model": "nowhere/target"},
        "generic_draft": "nowhere/draft",
        "datasets": [
            {"name": "humaneval", "path": str(tmp_path / "code.jsonl")},
            {"name": "gsm8k", "path": str(tmp_path / "sums.jsonl")},
        ],
        "experiments": ["baseline", "generic_draft"],
        "max_new_tokens": 8,
        "quality": {"sandbox": {"timeout_s": 20}},
        "output_dir": str(tmp_path / "results"),
    }
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def with_models(file: Path) -> list[str]:
    return ["--config", str(file), "--set", "target.model=tiny/target", "--set", "generic_draft=tiny/draft-generic"]


@pytest.mark.parametrize("name", ["eval_full", "eval_quick", "eval_routed", "base"])
def test_each_tiny_file_says_that_the_answers_are_the_plain_ones(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    small = ["--set", "datasets=[{name: chat, limit: 1}, {name: code, limit: 1}]", "--set", "max_new_tokens=8"]
    where = ["--set", f"output_dir={tmp_path}"]
    assert main(["evaluate", "--config", f"configs/tiny/{name}.yaml", "--dataset", "code", *small, *where]) == 0
    printed = capsys.readouterr()
    assert "speed-up" in printed.out
    words = [line for line in printed.out.splitlines() if line.startswith("code, ")]
    assert words
    assert all(line.endswith("greedy answers are the plain ones, token for token: their quality is equal") for line in words)
    assert f"records are in {tmp_path}/code" in printed.out
    assert printed.err == ""


def test_one_data_set_is_evaluated_or_all(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    assert main(["evaluate", *with_models(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = [(side["dataset"], side["cell"]["experiment"]) for side in told["sides"]]
    assert found == [(name, way) for name in ("humaneval", "gsm8k") for way in ("baseline", "generic_draft")]
    assert all(side["pass_at"]["1"]["value"] in (0.0, 1.0) for side in told["sides"])
    plain, ours = told["sides"][:2]
    assert plain["pass_at"] == ours["pass_at"]
    assert (ours["num_same"], ours["num_compared"], ours["overlap"]["value"], ours["agreement"]["value"]) == (1, 1, 1.0, 1.0)
    assert len(told["words"]) == 2
    assert main(["evaluate", *with_models(file), "--dataset", "gsm8k", "--json"]) == 0
    assert {side["dataset"] for side in json.loads(capsys.readouterr().out)["sides"]} == {"gsm8k"}


def test_pass_at_k_takes_sampled_answers(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    sampled = ["--set", "temperatures=[1.0]", "--set", "num_repeats=3", "--pass-k", "1,3"]
    assert main(["evaluate", *with_models(file), "--dataset", "gsm8k", *sampled, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [list(side["pass_at"]) for side in told["sides"]] == [["1", "3"]] * 2
    assert [side["speed"]["num_answers"] for side in told["sides"]] == [3, 3]
    assert "sampled answers at T 1 are right as often as the plain ones" in told["words"][0]


def test_log_lines_are_objects_where_they_are_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = ["--set", "datasets=[{name: code, limit: 2}]", "--set", "max_new_tokens=4", "--set", "part=1"]
    for command, options in (("benchmark", ["--log-format", "json"]), ("evaluate", ["--set", "logging.format=json"])):
        where = ["--set", f"output_dir={tmp_path / command}"]
        assert main([command, "--config", QUICK, *small, *where, *options]) == 0
        begun, *parts = map(json.loads, capsys.readouterr().err.splitlines())
        assert {line["command"] for line in (begun, *parts)} == {command}
        assert {line["run"] for line in (begun, *parts)} == {str(tmp_path / command)}
        assert (begun["num_cells"], begun["num_questions"], begun["num_parts"]) == (2, 2, 2)
        assert [(line["part"], line["num_done"], line["num_records"], line["num_errors"]) for line in parts] == [
            (0, 1, 2, 0),
            (1, 2, 2, 0),
        ]
    where = ["--set", f"output_dir={tmp_path / 'text'}", "--log-format", "text"]
    assert main(["evaluate", "--config", QUICK, *small, *where]) == 0
    assert [line.split(" ", 2)[2] for line in capsys.readouterr().err.splitlines()] == [
        f"2 ways to decode 2 questions, for {tmp_path / 'text'}",
        "1 of 2 parts are there",
        "2 of 2 parts are there",
    ]


def test_references_are_checked_without_models(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    assert main(["evaluate", "--config", str(file), "--check-references"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[0], row[-3:]) for row in rows] == [
        ("humaneval", ["1", "1.000", "1"]),
        ("humaneval", ["1", "0.000", "1"]),
        ("gsm8k", ["1", "1.000", "1"]),
        ("gsm8k", ["1", "1.000", "1"]),
        ("gsm8k", ["1", "0.000", "1"]),
    ]
    assert main(["evaluate", "--config", str(file), "--dataset", "gsm8k", "--check-references", "--json"]) == 0
    assert {judged["dataset"] for judged in json.loads(capsys.readouterr().out)} == {"gsm8k"}


MISTAKES: list[tuple[list[str], str]] = [
    (["datasets.0.path=missing.jsonl"], "missing.jsonl: cannot be read as rows: "),
    (["datasets.0.path=empty.jsonl"], "dataset humaneval at empty.jsonl: expected questions, found none"),
    (["datasets.0.path=other.jsonl"], "other.jsonl, row 0: expected a row of humaneval: no column 'prompt'; it has ["),
    (["datasets.0.name=human_eval", "datasets.0.path=null"], "datasets.0: name: expected one of alpaca, "),
    (["datasets.0={name: mine, path: other.jsonl, column: text}"], "expected a row of mine: no column 'text'"),
    (["datasets.2.path=a"], "expected a place in a list of 2, from 0, got 2"),
    (["datasets.a.path=a"], "expected a place in a list of 2, from 0, got a"),
    (["experiments=[baseline, generic]"], "experiments.1: input should be 'baseline'"),
    (["experiments=[baseline, adaptive_routing]"], "routing: expected a router's checkpoint"),
    (["logging.format=xml"], "logging.format: input should be 'text' or 'json', got 'xml'"),
    (["K=4"], "holds what was made with another configuration: expected a new folder"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
@pytest.mark.parametrize("command", ["benchmark", "evaluate", "job"])
def test_a_mistake_is_one_line_before_models_are_loaded(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: Path,
    command: str,
    overrides: list[str],
    message: str,
) -> None:
    (file.parent / "empty.jsonl").write_text("")
    read(file.parent, "alpaca", [ALPACA], "other.jsonl")
    Parts(file.parent / "results" / RECORDS, {"of": "another configuration"})
    monkeypatch.chdir(file.parent)
    options = ["--config", str(file), *(part for one in overrides for part in ("--set", one))]
    assert (benchmark_job(options) if command == "job" else main([command, *options])) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "human"], "datasets.0: name: expected one of alpaca, "),
        (["--dataset", "spec_bench"], "datasets.0: path: expected a copy of spec_bench, which is not on the Hub"),
        (["--set", "experiments=[baseline]"], "experiments: expected baseline and one beside it, got baseline"),
        (["--pass-k", "1,2"], "--pass-k: expected at least 1 and at most num_repeats, 1, got 1,2"),
        (["--pass-k", "all"], "--pass-k: expected whole numbers such as 1,10, got 'all'"),
        (["--set", "datasets=5"], "datasets: input should be a valid list"),
    ],
)
def test_a_mistake_of_evaluate_s_own_is_one_line(
    capsys: pytest.CaptureFixture[str], file: Path, options: list[str], message: str
) -> None:
    assert main(["evaluate", "--config", str(file), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_references_that_nobody_can_judge_are_one_line(capsys: pytest.CaptureFixture[str], file: Path) -> None:
    read(file.parent, "mt_bench", [MT_BENCH], "chat.jsonl")
    chosen: dict[str, Any] = {"name": "mt_bench", "path": str(file.parent / "chat.jsonl")}
    assert main(["evaluate", "--config", str(file), "--check-references", "--set", f"datasets=[{chosen}]"]) == 2
    assert "expected a data set with solutions that are judged" in capsys.readouterr().err
