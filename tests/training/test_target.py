"""A target learns from scratch, and a checkpoint is replaced whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from specdecode.config import check_config
from specdecode.training.checkpoints import save_tokenizer
from specdecode.training.target import TargetTrainingConfig, learn_target
from specdecode.training.trainer import replace_folder


def test_a_target_learns_and_knows_where_to_stop(
    values: dict[str, Any], blocks: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    shape = {"num_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = {
        "tokenizer": str(tmp_path / "tokenizer"),
        "architecture": shape,
        "data": values["data"],
        "training": values["training"] | {"num_train_steps": 40},
    }

    result = learn_target(check_config(config, TargetTrainingConfig, where="test"), blocks)
    best = Path(config["training"]["output_dir"]) / "best"
    model = AutoModelForCausalLM.from_pretrained(best, dtype=torch.float32)

    assert result.validation["loss"] < 4.5  # the logarithm of 285 tokens is 5.7
    assert model.generation_config.eos_token_id == [4, 0]
    assert AutoTokenizer.from_pretrained(best).chat_template


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
