"""Tiny random models, a tiny tokenizer and a tiny data directory, made in the test's own folder."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from specdecode.training.checkpoints import save_checkpoint
from specdecode.training.target import ArchitectureConfig, create_target
from specdecode.training.tokenizer import fit_tokenizer

QUESTION = "How many apples are {a} apples and {b} apples?"
ANSWER = "There are {a} and {b} apples. {a} + {b} = {c} apples.\n#### {c}"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = [QUESTION.format(a=a, b=a + 1) for a in range(20)] + [ANSWER.format(a=a, b=2, c=a + 2) for a in range(20)]
    return fit_tokenizer(iter(texts), vocabulary_size=320, max_length=512)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = ArchitectureConfig(num_layers=2, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
    return create_target(shape, tokenizer)


@pytest.fixture
def model_folder(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> str:
    folder = tmp_path / "model"
    save_checkpoint(model, tokenizer, folder)
    return str(folder)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """GSM8K's layout, with 200 questions of our own."""
    path = tmp_path / "data" / "reasoning" / "gsm8k" / "train.jsonl"
    path.parent.mkdir(parents=True)
    rows = [
        {"question": QUESTION.format(a=a, b=b), "answer": ANSWER.format(a=a, b=b, c=f"<<{a}+{b}={a + b}>>{a + b}")}
        for a in range(10)
        for b in range(20)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path / "data"
