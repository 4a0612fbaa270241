"""A trained family is measured and published with cards that state what was done."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from specdecode.config import check_config
from specdecode.errors import ConfigError
from specdecode.training.checkpoints import save_checkpoint
from specdecode.training.draft import DraftTrainingConfig, learn
from specdecode.training.provenance import write_run
from specdecode.training.release import ReleaseConfig, release

RESULT = {"num_steps": 5, "best_step": 5, "num_tokens": 1000, "time_s": 60.0, "validation": {"loss": 2.0}}


@pytest.fixture
def config(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, values: dict[str, Any], blocks: Path, tmp_path: Path
) -> ReleaseConfig:
    """A random target and a draft of one layer that was trained for a moment."""
    checkpoints, prompts = tmp_path / "checkpoints", tmp_path / "prompts"
    save_checkpoint(model, tokenizer, checkpoints / "target" / "best")
    architecture = {"num_layers": 2, "hidden_size": 32}
    run = {"config": {"architecture": architecture, "data": values["data"]}, "result": RESULT}
    (checkpoints / "target" / "run.json").write_text(json.dumps(run | {"versions": {"torch": "2.13"}}))
    values["model"] |= {"draft_model": str(checkpoints / "target/best"), "target_model": str(checkpoints / "target/best")}
    values["training"] |= {"output_dir": str(checkpoints / "draft-reasoning"), "num_train_steps": 1}
    draft = check_config(values, DraftTrainingConfig, where="test")
    write_run(checkpoints / "draft-reasoning", draft, learn(draft, blocks))
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
    assert set(table.scores) == {(origin, "draft-reasoning", "reasoning") for origin in ("built-in", "held-out")}
    assert all(0 <= scores.greedy.rate <= 1 for scores in table.scores.values())
    assert table.as_markdown() in card
    assert "GSM8K, training split (openai/grade-school-math) | 100% | MIT |" in card
    for name in ("target", "draft-reasoning"):
        AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / name, dtype=torch.float32)


def test_a_missing_training_is_named(config: ReleaseConfig) -> None:
    with pytest.raises(ConfigError, match=r"expected a finished training in .*draft-code"):
        release(config.model_copy(update={"drafts": {"code": "draft-code"}}))
