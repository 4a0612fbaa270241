"""Tiny random models, a tiny tokenizer and a tiny data directory, made in the test's own folder."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from specdecode.training.checkpoints import save_checkpoint
from specdecode.training.data import TRAINING, VALIDATION, training_blocks, validation_blocks, write_blocks
from specdecode.training.documents import load_documents
from specdecode.training.examples import Example, Formatter, end_of_text
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


@pytest.fixture
def examples(tokenizer: PreTrainedTokenizerFast, data_dir: Path) -> list[Example]:
    """The questions and their answers."""
    found = [Formatter(tokenizer).example(document) for document in load_documents("gsm8k", data_dir)]
    return [example for example in found if example is not None]


@pytest.fixture
def values(model_folder: str, data_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A training of a one-layer draft that takes about a second."""
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
            "log_every": 1,
            "num_validation_blocks": 8,
            "num_workers": 0,
            "device": "cpu",
            "precision": "float32",
        },
        "distillation": {"enabled": True, "completions": {"num_prompts": 8, "max_new_tokens": 12, "batch": 4, "part": 8}},
    }


@pytest.fixture
def blocks(examples: list[Example], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """Blocks of 32 tokens, more than enough for any of these trainings."""
    folder, pad_id = tmp_path / "blocks", end_of_text(tokenizer)
    learned, held_out = {"gsm8k": examples[20:]}, {"gsm8k": examples[:20]}
    write_blocks(folder / TRAINING, [("training", islice(training_blocks(learned, {"gsm8k": 1.0}, 32, pad_id, 0), 400))])
    write_blocks(folder / VALIDATION, validation_blocks(held_out, 8, 32, pad_id, 0).items())
    return folder
