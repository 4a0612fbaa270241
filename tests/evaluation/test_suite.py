"""Every cell answers every question, greedy answers are the baseline's, and what was stopped goes on with what is missing."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from specdecode.config import check_config
from specdecode.errors import ConfigError, RequestError
from specdecode.evaluation.benchmark import RECORDS, read_run, run_benchmark
from specdecode.evaluation.records import Record
from specdecode.evaluation.runner import Runner
from specdecode.evaluation.suite import BenchmarkConfig, Cell, as_rows, cells, load_items
from tests.evaluation.test_datasets import HUMANEVAL, MT_BENCH, read

OWN_EXPERIMENTS = ["baseline", "generic_draft", "specialized_drafts", "ablation_K"]
PEERS = ["hf_plain", "hf_assisted", "prompt_lookup"]


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    read(tmp_path, "humaneval", [HUMANEVAL], "code.jsonl")
    read(tmp_path, "mt_bench", [MT_BENCH], "chat.jsonl")
    return {
        "target": {"model": "tiny/target"},
        "generic_draft": "tiny/draft-generic",
        "draft_models": {"code": "tiny/draft-code", "chat": "tiny/draft-chat"},
        "datasets": [
            {"name": "builtin", "limit": 2},
            {"name": "humaneval", "path": str(tmp_path / "code.jsonl")},
            {"name": "mt_bench", "path": str(tmp_path / "chat.jsonl")},
        ],
        "experiments": [*OWN_EXPERIMENTS, *PEERS],
        "ablation_K": [2, 3],
        "K": 4,
        "max_new_tokens": 12,
        "output_dir": str(tmp_path / "results"),
        "part": 2,
        "quality": {"perplexity": True, "sandbox": {"timeout_s": 20}},
    }


def config_of(values: dict[str, Any], **changes: Any) -> BenchmarkConfig:
    return check_config(values | changes, BenchmarkConfig, where="test")


def test_all_cells_are_there(values: dict[str, Any]) -> None:
    config = config_of(values, temperatures=[0.0, 1.0], verifiers=["rejection", "block"], batches=[1, 2])
    found = cells(config)
    assert found[0] == Cell("baseline", "none", 0, 0.0, "rejection", 1)
    assert len(set(found)) == len(found)
    counts = Counter((cell.experiment, cell.temperature, cell.batch) for cell in found)
    assert counts["specialized_drafts", 0.0, 1] == 2
    assert counts["specialized_drafts", 1.0, 2] == 4  # with either verifier
    assert counts["ablation_K", 1.0, 1] == 4
    assert counts["hf_assisted", 1.0, 1] == 1
    assert not any(cell.batch > 1 for cell in found if cell.experiment in PEERS)


def test_parts_have_some_of_every_data_set(values: dict[str, Any]) -> None:
    config = config_of(values, datasets=[{"name": "code", "limit": 6}, {"name": "chat", "limit": 3}])
    assert [name for name, _ in load_items(config)] == ["code", "chat", "code"] * 3
    rows = as_rows(load_items(config), 4)
    assert [len(row["items"]) for row in rows] == [4, 4, 1]


def test_every_cell_gives_the_baseline_s_answers(values: dict[str, Any]) -> None:
    """Of all turns, in batches, by every way to decode, transformers' own included."""
    config = config_of(values, batches=[1, 2])
    records = run_benchmark(config)
    assert not [record.error for record in records if record.error]
    questions = {record.question for record in records}
    assert len(questions) == 2 + 1 + 2  # the last has two turns
    assert len(records) == len(cells(config)) * len(questions)
    plain = {r.question: r.tokens for r in records if r.experiment == "baseline" and r.batch == 1}
    for record in records:
        assert record.tokens == plain[record.question], record
        assert sum(record.round_tokens) == len(record.tokens) > 0
        assert len(record.gaps_s) == len(record.round_tokens) - 1
        assert 0 < record.ttft_s <= record.latency_s <= record.group_time_s
        assert record.num_accepted <= record.num_drafted <= record.K * len(record.round_tokens)
        assert sum(record.num_accepted_at) == record.num_accepted
        assert record.perplexity is not None
        assert (record.is_right is None) == (record.dataset != "humaneval")
    assert any(record.num_accepted for record in records)
    own = {(r.domain, r.drafter) for r in records if r.experiment == "ablation_K" and r.num_drafted}
    assert own <= {("code", "code"), ("chat", "chat")}
    together = Counter(record.group for record in records if record.batch == 2)
    assert set(together.values()) == {1, 2}
    assert all(record.num_together == together[record.group] for record in records if record.batch == 2)


def test_sampled_answers_are_repeatable(values: dict[str, Any]) -> None:
    experiments = ["baseline", "generic_draft", "hf_assisted"]
    config = config_of(values, temperatures=[1.0], num_repeats=2, experiments=experiments)
    rows = as_rows(load_items(config), 2)[:1]
    first, second = (list(Runner(config.model_dump(), "").records(0, load_items(config)[:2])) for _ in range(2))
    assert rows[0]["number"] == 0
    assert [record.tokens for record in first] == [record.tokens for record in second]
    assert {record.repeat for record in first} == {0, 1}
    repeats = [{tuple(r.tokens) for r in first if r.experiment == name and r.item == first[0].item} for name in experiments]
    assert any(len(answers) == 2 for answers in repeats)


def test_what_was_stopped_goes_on(values: dict[str, Any]) -> None:
    config = config_of(values, experiments=["baseline", "generic_draft"])
    told: list[tuple[int, int]] = []
    whole = run_benchmark(config, tell=lambda done, count: told.append((done, count)))
    assert told == [(0, 2), (1, 2), (2, 2)]
    part = Path(config.output_dir) / RECORDS / "part-00000.parquet"
    kept = (part.with_name("part-00001.parquet")).read_bytes()
    part.unlink()
    with pytest.raises(ConfigError, match="1 of 2 parts are missing"):
        read_run(config.output_dir)
    told.clear()
    again = run_benchmark(config, tell=lambda done, count: told.append((done, count)))
    assert told == [(1, 2), (2, 2)]
    assert (part.with_name("part-00001.parquet")).read_bytes() == kept
    assert [(r.question, r.experiment, r.tokens) for r in again] == [(r.question, r.experiment, r.tokens) for r in whole]
    read_config, run, records = read_run(config.output_dir)
    assert (read_config, records) == (config, again)
    assert run["machine"]["num_cores"] > 0
    assert run["num_questions"] == 4
    with pytest.raises(ConfigError, match="made with another configuration: expected a new folder"):
        run_benchmark(config_of(values, experiments=["baseline"]))


def test_a_failure_is_a_record_that_says_so(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(values, experiments=["baseline", "generic_draft"])
    runner = Runner(config.model_dump(), "")
    decode = runner._decode

    def fail(cell: Cell, *rest: Any) -> list[Record]:
        if cell.experiment == "generic_draft":
            raise RequestError("prompt: too\nlong")
        return decode(cell, *rest)

    monkeypatch.setattr(runner, "_decode", fail)
    records = list(runner.records(0, load_items(config)[:2]))
    assert {record.error for record in records if record.experiment == "generic_draft"} == {"RequestError: prompt: too long"}
    assert all(record.tokens == [] for record in records if record.error)
    assert {record.error for record in records if record.experiment == "baseline"} == {None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiments": ["generic"]}, "experiments.0: input should be 'baseline', 'generic_draft'"),
        ({"experiments": ["generic_draft", "hf_plain"]}, "expected baseline among them"),
        ({"generic_draft": None}, "generic_draft: expected a model, for generic_draft"),
        ({"draft_models": {}}, "draft_models: expected drafts, for ablation_K"),
        ({"experiments": ["baseline", "adaptive_routing"]}, "routing: expected a router's checkpoint"),
        ({"batches": [2]}, "batches: expected 1 among them, for hf_assisted"),
        ({"batches": [1, 4]}, "part: expected a multiple of the largest batch, 4, got 2"),
        ({"draft_models": {"own": "tiny/draft-code"}}, "expected names of domains, got own"),
        ({"datasets": []}, "datasets: list should have at least 1 item"),
    ],
)
def test_what_does_not_go_together_is_told(values: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config_of(values, **changes)
    assert "\n" not in str(caught.value)


def test_a_missing_data_set_is_told_before_models_are_loaded(values: dict[str, Any]) -> None:
    config = config_of(values, target={"model": "nowhere"}, datasets=[{"name": "gsm8k", "path": "nowhere.jsonl"}])
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: cannot be read as rows"):
        run_benchmark(config)


def test_a_folder_without_results_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected the results of a benchmark, but run\.json cannot be read"):
        read_run(tmp_path)
