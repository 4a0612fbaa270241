"""A training leaves a model with its card; a trained family is compared and published with cards that state what was done."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from specdecode.config import check_config
from specdecode.errors import ConfigError
from specdecode.training.checkpoints import save_checkpoint
from specdecode.training.comparison import ComparisonConfig, as_markdown
from specdecode.training.data import DataConfig
from specdecode.training.draft import DraftTrainingConfig, learn
from specdecode.training.model_card import model_card
from specdecode.training.provenance import read_run, write_run
from specdecode.training.release import ReleaseConfig, release
from specdecode.training.target import TargetTrainingConfig
from specdecode.training.trainer import TrainingResult


@pytest.fixture
def draft(values: dict[str, Any], blocks: Path, tmp_path: Path) -> Path:
    """A draft of one layer that was trained for a moment: the folder of the training."""
    values["training"] |= {"output_dir": str(tmp_path / "checkpoints/draft-reasoning"), "num_train_steps": 1}
    config = check_config(values, DraftTrainingConfig, where="test")
    write_run(tmp_path / "checkpoints/draft-reasoning", config, learn(config, blocks))
    return tmp_path / "checkpoints/draft-reasoning"


@pytest.fixture
def config(
    draft: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, values: dict[str, Any], tmp_path: Path
) -> ReleaseConfig:
    """The draft and a random target."""
    target = tmp_path / "checkpoints/target"
    save_checkpoint(model, tokenizer, target / "best")
    names = ("num_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    told = {
        "tokenizer": str(target),
        "architecture": dict(zip(names, (2, 32, 64, 2, 1), strict=True)),
        "data": values["data"],
        "training": values["training"],
    }
    result = TrainingResult(num_steps=5, best_step=5, num_tokens=1000, time_s=60.0, validation={"loss": 2.0})
    write_run(target, check_config(told, TargetTrainingConfig, where="test"), result)
    return ReleaseConfig(
        comparison=ComparisonConfig(
            target=str(target / "best"),
            drafts={"reasoning": str(draft / "best")},
            domains={"reasoning": DataConfig(**values["data"])},
            num_prompts=3,
            max_new_tokens=6,
            num_timed=1,
        ),
        output_dir=str(tmp_path / "published"),
        licence="mit",
        about="It is small.",
        recipes={"draft-reasoning": "make draft-reasoning"},
    )


def test_a_training_leaves_its_card_and_how_it_came_about_beside_the_model(draft: Path) -> None:
    card, run = (draft / "best/README.md").read_text(), read_run(draft / "best")
    metadata = yaml.safe_load(card.split("---\n")[1])

    assert metadata["library_name"] == "transformers"
    assert "license" not in metadata  # which only those know who give it
    assert "base_model" not in metadata  # a folder of this machine
    assert "# draft-reasoning" in card
    assert "1 x forward kl, at temperature 1" in card
    assert "75% were the target's own answers to 8 prompts" in card
    assert f"| all | {run['result']['validation']['loss']:.3f} |" in card
    assert "GSM8K, training split (openai/grade-school-math) | 100% | MIT |" in card
    assert run["config"]["training"]["learning_rate"] == 0.01
    assert read_run(draft) == run


def test_the_card_names_public_models_and_data(draft: Path) -> None:
    run = read_run(draft)
    run["config"]["model"] |= {"draft_model": "Qwen/Qwen2.5-1.5B", "target_model": "Qwen/Qwen2.5-7B", "num_layers": None}
    run["config"]["data"] |= {"dataset_name": "openai/gsm8k", "sources": {}}
    run["config"]["distillation"] |= {"enabled": False}
    card = model_card("draft", run)
    metadata = yaml.safe_load(card.split("---\n")[1])

    assert metadata["base_model"] == "Qwen/Qwen2.5-1.5B"
    assert metadata["datasets"] == "openai/gsm8k"
    assert "A draft for `Qwen/Qwen2.5-7B`, for the domain `reasoning`" in card
    assert "It began as `Qwen/Qwen2.5-1.5B` and was fine-tuned on the data's own text." in card


def test_the_card_names_new_layers(draft: Path) -> None:
    run = read_run(draft)
    run["config"]["model"] |= {"draft_model": "tiny/draft-chat", "num_layers": None, "new_layers": 1}
    assert "It began as `tiny/draft-chat`, with 1 new layer(s) on top that changed nothing at first, and" in model_card(
        "draft", run
    )


def test_the_card_has_the_figures_of_each_source(draft: Path) -> None:
    run = read_run(draft)
    figures = {"loss": 1.5, "gsm8k_loss": 1.25, "aqua_rat_loss": 1.75}
    run["result"] = run["result"] | {"validation": figures}
    card = model_card("draft", run)

    for line in ("|  | loss |", "| all | 1.500 |", "| gsm8k | 1.250 |", "| aqua_rat | 1.750 |"):
        assert line in card.splitlines()


def test_a_family_is_published_with_cards(config: ReleaseConfig) -> None:
    rows = release(config)

    published = Path(config.output_dir)
    assert {folder.name for folder in published.iterdir()} == {"target", "draft-reasoning"}
    for name in ("target", "draft-reasoning"):
        AutoModelForCausalLM.from_pretrained(published / name, dtype=torch.float32)
        card = (published / name / "README.md").read_text()
        assert as_markdown(rows) in card
        assert "It is small." in card
        assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert "`make draft-reasoning`" in (published / "draft-reasoning/README.md").read_text()
    assert "2 layers of width 32" in (published / "target/README.md").read_text()


def test_of_a_model_that_was_published_before_only_the_comparison_is_renewed(config: ReleaseConfig) -> None:
    first = release(config)
    published = Path(config.output_dir) / "target"
    before = {file.name: file.read_bytes() for file in published.iterdir()}
    comparison = config.comparison.model_copy(update={"target": str(published), "num_prompts": 2})
    rows = release(config.model_copy(update={"comparison": comparison}))

    after = {file.name: file.read_bytes() for file in published.iterdir()}
    card = after.pop("README.md").decode()
    old = before.pop("README.md").decode()
    assert after == before
    assert as_markdown(rows) in card
    assert as_markdown(first) not in card
    assert "2 held-out prompts" in card
    assert card.split("## The family compared")[0] == old.split("## The family compared")[0]


def test_a_missing_training_is_named(config: ReleaseConfig, tmp_path: Path) -> None:
    missing = config.comparison.model_copy(update={"drafts": {"code": str(tmp_path / "draft-code/best")}})
    with pytest.raises(ConfigError, match=r"draft-code/best: expected the model of a finished training"):
        release(config.model_copy(update={"comparison": missing}))
