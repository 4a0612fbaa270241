"""A target learns from scratch, and its recipe loads."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from specdecode.config import check_config, load_config
from specdecode.training.checkpoints import save_tokenizer
from specdecode.training.draft import DraftTrainingConfig
from specdecode.training.release import ReleaseConfig
from specdecode.training.target import TargetTrainingConfig, train_target
from specdecode.training.tokenizer import TokenizerConfig
from specdecode.training.trainer import TrainingConfig, learning_rate_factor, replace_folder

RECIPES = {
    "tokenizer": TokenizerConfig,
    "pretrain_target": TargetTrainingConfig,
    "distill_generic": DraftTrainingConfig,
    "distill_code": DraftTrainingConfig,
    "distill_chat_start": DraftTrainingConfig,
    "distill_chat": DraftTrainingConfig,
    "distill_reasoning": DraftTrainingConfig,
    "train_release": ReleaseConfig,
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_the_embedded_family_loads(name: str) -> None:
    assert load_config(Path("configs/tiny") / f"{name}.yaml", RECIPES[name])


def test_a_target_learns_and_knows_where_to_stop(tokenizer: PreTrainedTokenizerFast, data_dir: Path, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    values = {
        "tokenizer": str(tmp_path / "tokenizer"),
        "architecture": {
            "num_layers": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "data": {"data_dir": str(data_dir), "domains": {"reasoning": {"gsm8k": 1.0}}},
        "training": {
            "output_dir": str(tmp_path / "target"),
            "num_train_steps": 30,
            "per_device_batch_size": 4,
            "sequence_length": 64,
            "learning_rate": 0.01,
            "num_warmup_steps": 2,
            "num_validation_batches": 1,
            "precision": "float32",
        },
    }

    result = train_target(check_config(values, TargetTrainingConfig, where="test"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target" / "best", dtype=torch.float32)

    assert result.validation_losses["reasoning"] < 4.5  # the logarithm of 320 tokens is 5.8
    assert result.num_tokens == 30 * 4 * 63
    assert model.generation_config.eos_token_id == [4, 0]
    assert AutoTokenizer.from_pretrained(tmp_path / "target" / "best").chat_template


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    config = TrainingConfig(output_dir="", num_train_steps=100, per_device_batch_size=1, learning_rate=1.0, num_warmup_steps=10)
    factors = [learning_rate_factor(step, config) for step in range(100)]

    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[10] == 1
    assert factors[99] == pytest.approx(config.min_learning_rate_ratio, abs=0.01)


def test_a_checkpoint_is_replaced_at_once_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    replace_folder(folder, lambda new: (new / "weights").write_text("old") and None)

    def fail(new: Path) -> None:
        (new / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(folder, fail)

    assert (folder / "weights").read_text() == "old"
    replace_folder(folder, lambda new: (new / "weights").write_text("new") and None)
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
