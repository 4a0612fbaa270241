"""The embedded family is small, complete and of one vocabulary."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdecode
from specdecode.backends.backend import create_backend
from specdecode.decoding.drafters import NoDrafter
from specdecode.decoding.sequence import SamplingParams
from specdecode.evaluation.prompts import load_prompts
from specdecode.text import Tokenizer
from specdecode.training.completions import complete

TINY = Path(specdecode.__file__).parent / "embedded" / "tiny"
PROMPTS = Path(specdecode.__file__).parent / "evaluation" / "prompts"
NAMES = ("target", "draft-generic", "draft-code", "draft-chat", "draft-reasoning")


def test_the_family_is_small() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 32_000_000


@pytest.mark.parametrize("name", NAMES)
def test_each_model_loads_and_says_what_it_is(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32)

    assert model.config.num_hidden_layers == (8 if name == "target" else 1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == [4, 0]
    assert "license: mit" in (TINY / name / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_stored_once_in_bfloat16(name: str) -> None:
    with safe_open(TINY / name / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118  not a mapping
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118  not a mapping


def test_all_have_one_tokenizer() -> None:
    vocabularies = [AutoTokenizer.from_pretrained(TINY / name).get_vocab() for name in NAMES]

    assert len(vocabularies[0]) == 4096
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


@pytest.mark.parametrize("domain", ["code", "chat", "reasoning"])
def test_the_built_in_prompts_are_well_formed(domain: str) -> None:
    rows = [json.loads(line) for line in (PROMPTS / f"{domain}.jsonl").read_text().splitlines()]

    assert [row["id"] for row in rows] == [f"{domain}-{number:03}" for number in range(1, 61)]
    assert {(row["domain"], row["format"]) for row in rows} == {(domain, "raw" if domain == "code" else "chat")}
    assert len({row["prompt"] for row in rows}) == 60


@pytest.mark.parametrize("domain", ["code", "chat", "reasoning"])
def test_the_target_answers_the_built_in_prompts(domain: str) -> None:
    tokenizer = Tokenizer("tiny/target")
    prompts = [prompt.encode(tokenizer) for prompt in load_prompts(domain)[:8]]

    answers = complete(prompts, create_backend("tiny/target"), NoDrafter(), lambda _: SamplingParams(max_tokens=24))

    assert sum(len(answer.tokens) for answer in answers) / len(answers) > 12
