"""A trained family is measured and published with cards that state what was done."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from specdecode.config import check_config
from specdecode.errors import ConfigError
from specdecode.training.checkpoints import save_checkpoint
from specdecode.training.draft import DraftTrainingConfig, train_draft
from specdecode.training.release import ReleaseConfig, release

RESULT = {"num_steps": 5, "best_step": 5, "num_tokens": 1000, "time_s": 60.0, "validation_losses": {"mean": 2.0}}


@pytest.fixture
def config(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data_dir: Path, tmp_path: Path) -> ReleaseConfig:
    """A random target and a draft of one layer that was trained for a moment."""
    checkpoints, prompts = tmp_path / "checkpoints", tmp_path / "prompts"
    save_checkpoint(model, tokenizer, checkpoints / "target" / "best")
    architecture = {"num_layers": 2, "hidden_size": 32}
    run = {"config": {"architecture": architecture, "data": {"domains": {"reasoning": {"gsm8k": 1.0}}}}, "result": RESULT}
    (checkpoints / "target" / "run.json").write_text(json.dumps(run | {"versions": {"torch": "2.13"}}))
    draft = {
        "model": {"draft_model": str(checkpoints / "target/best"), "target_model": str(checkpoints / "target/best")},
        "data": {"domain": "reasoning", "data_dir": str(data_dir), "sources": {"gsm8k": 1.0}},
        "training": {
            "output_dir": str(checkpoints / "draft-reasoning"),
            "num_train_steps": 1,
            "per_device_batch_size": 2,
            "sequence_length": 16,
            "learning_rate": 0.001,
        },
        "distillation": {"num_prompts": 2, "max_new_tokens": 4},
    }
    draft["model"]["num_layers"] = 1
    train_draft(check_config(draft, DraftTrainingConfig, where="test"))
    prompts.mkdir()
    question = {"id": "reasoning-001", "domain": "reasoning", "format": "chat", "prompt": "How many apples?"}
    (prompts / "reasoning.jsonl").write_text(json.dumps(question) + "\n")
    return ReleaseConfig(
        checkpoints_dir=str(checkpoints),
        prompts_dir=str(prompts),
        output_dir=str(tmp_path / "published"),
        drafts={"reasoning": "draft-reasoning"},
        num_prompts=3,
        max_new_tokens=6,
    )


def test_a_family_is_published_with_cards(config: ReleaseConfig) -> None:
    table = release(config)

    card = (Path(config.output_dir) / "draft-reasoning" / "README.md").read_text()
    assert set(table.rates) == {(origin, "draft-reasoning", "reasoning") for origin in ("built-in", "held-out")}
    assert all(0 <= rate <= 1 for rate in table.rates.values())
    assert table.as_markdown() in card
    assert "GSM8K, training split (openai/grade-school-math) | 100% | MIT |" in card
    for name in ("target", "draft-reasoning"):
        AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / name, dtype=torch.float32)


def test_a_missing_training_is_named(config: ReleaseConfig) -> None:
    with pytest.raises(ConfigError, match=r"expected a finished training in .*draft-code"):
        release(config.model_copy(update={"drafts": {"code": "draft-code"}}))
