"""A short training learns, keeps its best checkpoint, and refuses what cannot work in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from jobs import train_draft as job
from specdecode.config import check_config
from specdecode.errors import ConfigError, ModelError
from specdecode.training.continuations import Continuation, remember
from specdecode.training.draft import DraftTrainingConfig, train_draft


@pytest.fixture
def values(model_folder: str, data_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A distillation of a one-layer draft that takes about a second."""
    return {
        "model": {"draft_model": model_folder, "target_model": model_folder, "num_layers": 1},
        "data": {"domain": "reasoning", "data_dir": str(data_dir), "sources": {"gsm8k": 1.0}},
        "training": {
            "output_dir": str(tmp_path / "draft"),
            "num_train_steps": 12,
            "per_device_batch_size": 4,
            "sequence_length": 32,
            "learning_rate": 0.01,
            "num_warmup_steps": 2,
            "validate_every": 4,
            "log_every": 4,
            "num_validation_batches": 2,
            "precision": "float32",
        },
        "distillation": {"num_prompts": 8, "max_new_tokens": 12},
    }


def config_of(values: dict[str, Any]) -> DraftTrainingConfig:
    return check_config(values, DraftTrainingConfig, where="test")


def test_distillation_brings_the_draft_closer_to_its_target(values: dict[str, Any]) -> None:
    values["training"]["num_train_steps"] = 1
    before = train_draft(config_of(values)).validation_losses
    values["training"]["num_train_steps"] = 30

    after = train_draft(config_of(values)).validation_losses

    assert set(after) == {"text", "continuations", "mean"}
    assert after["text"] < before["text"]
    assert after["continuations"] < before["continuations"]


def test_fine_tuning_lowers_the_loss_and_needs_no_target(values: dict[str, Any]) -> None:
    del values["model"]["target_model"]
    values["distillation"] = {"enabled": False}

    result = train_draft(config_of(values))

    assert set(result.validation_losses) == {"text", "mean"}
    assert result.validation_losses["text"] < 5  # the logarithm of 320 tokens is 5.8


def test_the_best_checkpoint_loads_at_once(values: dict[str, Any]) -> None:
    train_draft(config_of(values))
    output_dir = Path(values["training"]["output_dir"])

    model = AutoModelForCausalLM.from_pretrained(output_dir / "best", dtype=torch.float32)

    assert model.config.num_hidden_layers == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sorted(path.name for path in output_dir.iterdir()) == ["best", "continuations.jsonl", "run.json"]
    assert json.loads((output_dir / "run.json").read_text())["config"]["data"]["domain"] == "reasoning"


def test_two_runs_of_one_config_are_equal(values: dict[str, Any]) -> None:
    first = train_draft(config_of(values)).validation_losses
    values["training"]["output_dir"] += "-again"

    assert train_draft(config_of(values)).validation_losses == first


def test_a_draft_reads_a_local_data_set(values: dict[str, Any], data_dir: Path) -> None:
    values["data"] = {
        "domain": "reasoning",
        "dataset_name": str(data_dir / "reasoning/gsm8k/train.jsonl"),
        "columns": {"prompt": "question", "response": "answer"},
    }

    assert train_draft(config_of(values)).num_steps == 12


def test_a_column_that_is_not_there(values: dict[str, Any], data_dir: Path) -> None:
    values["data"] = {"domain": "code", "dataset_name": str(data_dir / "reasoning/gsm8k/train.jsonl")}

    with pytest.raises(ConfigError, match=r"no column content; it has \['question', 'answer'\]"):
        train_draft(config_of(values))


def test_another_vocabulary_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in Path(values["model"]["target_model"]).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer_json = other / "tokenizer.json"
    tokenizer_json.write_text(tokenizer_json.read_text().replace("<|system|>", "<|tool|>"))
    values["model"]["target_model"] = str(other)

    with pytest.raises(ModelError, match="another vocabulary"):
        train_draft(config_of(values))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.target_model", None, "model.target_model: expected a model to distil from"),
        ("data.sources", {}, "data: expected either dataset_name or sources"),
        ("data.domain", "poetry", "data.domain: input should be 'code', 'chat', 'reasoning' or 'generic'"),
        ("training.num_train_steps", "many", "training.num_train_steps: input should be a valid integer"),
        ("training.epochs", 3, "training.epochs: unknown key"),
        ("model.draft_model", "/nowhere/at/all", "/nowhere/at/all: does not load"),
        ("data.sources", {"nonsense": 1.0}, "data source nonsense: unknown"),
    ],
)
def test_the_job_says_in_one_line_what_is_wrong(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: Any, message: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))

    status = job.main(["--config", str(path), "--set", f"{key}={json.dumps(value)}"])

    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


def test_wandb_is_asked_for_only_when_it_is_wanted(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    values["logging"] = {"use_wandb": True}

    with pytest.raises(ConfigError, match="expected wandb to be installed"):
        train_draft(config_of(values))


def test_continuations_are_made_anew_when_their_settings_change(tmp_path: Path) -> None:
    path, calls = tmp_path / "continuations.jsonl", []

    def make() -> list[Continuation]:
        calls.append(1)
        return [Continuation([1, 2], [3])]

    assert remember(path, {"seed": 1}, make) == remember(path, {"seed": 1}, make) == [Continuation([1, 2], [3])]
    assert len(calls) == 1
    remember(path, {"seed": 2}, make)
    assert len(calls) == 2
