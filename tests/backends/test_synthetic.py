"""A synthetic pair agrees as often as was asked for, and is an ordinary target and draft to all that loads it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdecode import create_backend, speculative_decode
from specdecode.backends.backend import ModelBackend, Row
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.synthetic import PairFigures, SyntheticConfig, save_pair
from specdecode.cli import main
from specdecode.config import check_config
from specdecode.decoding.drafters import NoDrafter
from specdecode.decoding.loop import generate
from specdecode.decoding.sequence import Route, SamplingParams, Sequence
from specdecode.errors import ConfigError
from specdecode.text import Tokenizer

SHAPE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 176,
    "vocab_size": 300,
    "max_length": 512,
}
WEIGHTS = "model.safetensors"


class Pair(NamedTuple):
    """What was asked for, where it is, and what was measured."""

    agreement: float
    target: Path
    draft: Path
    figures: PairFigures


@pytest.fixture(scope="module", params=[0.5, 0.85])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    config = SyntheticConfig(**SHAPE, agreement=request.param)
    return Pair(request.param, *save_pair(config, tmp_path_factory.mktemp("pair")))


def continuations(target: ModelBackend, num: int, length: int, temperature: float) -> list[list[int]]:
    """Texts of the target's own, each after another prompt of 16 random tokens."""
    rng = torch.Generator().manual_seed(1)
    prompts = torch.randint(target.vocab_size, (num, 16), generator=rng).tolist()
    sequences = [
        Sequence(prompt, SamplingParams(temperature, max_tokens=length, seed=seed, ignore_eos=True), Route("none", 0))
        for seed, prompt in enumerate(prompts)
    ]
    for _ in generate(sequences, NoDrafter(), target):
        pass
    return [sequence.tokens for sequence in sequences]


def distributions(model: ModelBackend, texts: list[list[int]], length: int) -> torch.Tensor:
    """At the places of each text's last `length` tokens, as [texts * length, vocab_size]."""
    rows = [Row(f"scored {number}", text[:-1], length) for number, text in enumerate(texts)]
    return model.logits(rows).softmax(-1)


def test_the_draft_agrees_as_often_as_was_asked_for(pair):
    assert abs(pair.figures.agreement - pair.agreement) <= 0.01
    target, draft = create_backend(pair.target), create_backend(pair.draft)
    texts = continuations(target, num=32, length=128, temperature=1.0)
    p, q = (distributions(model, texts, 128) for model in (target, draft))
    # Here and there some thousand places, so a standard error of 0.01 between the two.
    assert abs((p.argmax(-1) == q.argmax(-1)).double().mean() - pair.agreement) < 0.03
    assert abs(torch.minimum(p, q).sum(-1).mean() - pair.figures.overlap) < 0.03
    assert abs(torch.special.entr(p).sum(-1).mean() - pair.figures.entropy) < 0.1


@pytest.mark.parametrize("entropy", [1.5, 3.0])
def test_distributions_are_as_spread_as_was_asked_for(entropy, tmp_path):
    _, _, figures = save_pair(SyntheticConfig(**SHAPE, agreement=1, entropy=entropy), tmp_path)
    assert abs(figures.entropy - entropy) < 0.4


def test_decoding_with_the_draft_gives_the_greedy_text_and_accepts_as_often_as_they_agree(pair):
    target, draft = create_backend(pair.target), create_backend(pair.draft)
    num_drafted = num_accepted = 0
    for text in continuations(target, num=8, length=96, temperature=0.0):
        output, metrics = speculative_decode(target, draft, torch.tensor([text[:16]]), 96, K=1, ignore_eos=True)
        assert output[0].tolist() == text
        num_drafted += metrics.num_drafted
        num_accepted += metrics.num_accepted
    assert num_drafted > 350
    assert abs(num_accepted / num_drafted - pair.agreement) < 0.07  # below three standard errors


def test_greedy_text_does_not_repeat_one_token(pair):
    for text in continuations(create_backend(pair.target), num=16, length=96, temperature=0.0):
        assert len(set(text[-32:])) > 1


def test_every_guess_is_accepted_at_an_agreement_of_one(tmp_path):
    target, draft, figures = save_pair(SyntheticConfig(**SHAPE, agreement=1), tmp_path)
    assert figures.agreement == 1
    assert figures.residual_scale == 0
    assert figures.overlap == pytest.approx(1)
    _, metrics = speculative_decode(create_backend(target), create_backend(draft), torch.tensor([[1, 2, 3]]), 60, K=4)
    assert metrics.num_accepted == metrics.num_drafted > 40


def test_the_draft_is_the_first_layers_of_the_target(tmp_path):
    target_folder, draft_folder, figures = save_pair(SyntheticConfig(**SHAPE, agreement=0.9, draft_layers=2), tmp_path)
    target, draft = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict() for folder in (target_folder, draft_folder)
    )
    assert all(torch.equal(weight, target[name]) for name, weight in draft.items())
    missing = {name.split(".")[2] for name in target.keys() - draft.keys()}
    assert missing == {"2", "3"}
    assert figures.num_target_parameters == sum(weight.numel() for weight in target.values())
    assert figures.num_draft_parameters == sum(weight.numel() for weight in draft.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_weights_are_stored_in_the_dtype(dtype, tmp_path):
    for folder in save_pair(SyntheticConfig(**SHAPE, agreement=1, dtype=dtype), tmp_path)[:2]:
        assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == getattr(torch, dtype)


def test_the_same_config_gives_the_same_weights_and_another_seed_gives_others(pair, tmp_path):
    state = torch.random.get_rng_state()
    again = save_pair(SyntheticConfig(**SHAPE, agreement=pair.agreement), tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again[2] == pair.figures
    for folder, first in zip(again[:2], (pair.target, pair.draft), strict=True):
        assert (folder / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    other, _, _ = save_pair(SyntheticConfig(**SHAPE, agreement=1, seed=1), tmp_path / "other")
    embeddings = [create_backend(folder).logits([Row("a", [5], 1)]) for folder in (pair.target, other)]
    assert not torch.allclose(*embeddings)


def test_both_have_one_tokenizer_that_fills_the_vocabulary(pair):
    target, draft = HuggingFaceBackend(str(pair.target)), HuggingFaceBackend(str(pair.draft))
    tokenizer = Tokenizer(str(pair.target))
    assert target.vocabulary_id == draft.vocabulary_id == tokenizer.vocabulary_id
    assert target.vocab_size == draft.vocab_size == 300
    assert sorted(tokenizer.vocabulary.values()) == list(range(300))
    assert target.eos_token_ids == draft.eos_token_ids == {tokenizer.eos_id}
    assert target.max_length == draft.max_length == 512


def test_the_tokenizer_takes_any_text_and_gives_it_back(pair):
    tokenizer = Tokenizer(str(pair.target))
    text = "the  quick brown fox\n\tnaïve café, 日本語, 😀"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" the the the")) < len(" the the the")  # some words are tokens


def test_the_tokenizer_has_a_chat_template(pair):
    tokenizer = Tokenizer(str(pair.target))
    prompt = tokenizer.encode_chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}])
    special = [token for token in prompt if token in tokenizer.special_ids]
    names = AutoTokenizer.from_pretrained(pair.target).convert_ids_to_tokens(special)
    assert names == ["<|system|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>"]
    assert tokenizer.decode(prompt) == "be briefhello"


def test_greedy_text_is_printable_token_by_token(pair):
    tokenizer, target = Tokenizer(str(pair.target)), create_backend(pair.target)
    for text in continuations(target, num=4, length=64, temperature=0.0):
        shown = [tokenizer.decode([token]) for token in text[16:]]
        assert all(piece.isprintable() and piece.isascii() and piece for piece in shown)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"draft_layers": 4, "num_layers": 4}, "draft_layers 4: expected fewer than num_layers 4"),
        ({"hidden_size": 500}, "hidden_size 500: expected an even multiple of num_heads 8"),
        ({"hidden_size": 24}, "hidden_size 24: expected an even multiple of num_heads 8"),
        ({"num_kv_heads": 3}, "num_kv_heads 3: expected a divisor of num_heads 8"),
        ({"vocab_size": 259}, "vocab_size: input should be greater than or equal to 260, got 259"),
        ({"agreement": 1.1}, "agreement: input should be less than or equal to 1, got 1.1"),
        ({"dtype": "int8"}, "dtype: input should be .*, got 'int8'"),
    ],
)
def test_an_impossible_shape_is_refused_in_one_line(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_config(values, SyntheticConfig, "synthetic")
    assert "\n" not in str(caught.value)


def test_an_agreement_out_of_reach_is_refused_with_the_nearest(tmp_path):
    narrow = {**SHAPE, "hidden_size": 4, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 4}
    with pytest.raises(ConfigError, match=r"agreement: .*, got 0\.0; the nearest was 0\.\d\d\d") as caught:
        save_pair(SyntheticConfig(**narrow, agreement=0.0), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="file/target: cannot be written"):
        save_pair(SyntheticConfig(**SHAPE), file)


def test_the_command_writes_the_pair_and_prints_its_figures(tmp_path, capsys):
    settings = [option for key, value in SHAPE.items() for option in ("--set", f"{key}={value}")]
    assert main(["synthetic", "--output", str(tmp_path), *settings, "--set", "agreement=0.7"]) == 0
    words = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert words["target"] == str(tmp_path / "target")
    assert words["draft"] == str(tmp_path / "draft")
    assert abs(float(words["agreement"]) - 0.7) < 0.02
    assert float(words["agreement"]) < float(words["overlap"]) < 1
    assert json.loads((tmp_path / "draft/config.json").read_text())["num_hidden_layers"] == 1


def test_a_mistake_on_the_command_line_is_one_line(tmp_path, capsys):
    assert main(["synthetic", "--output", str(tmp_path), "--set", "draft_layers=12"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("specdecode: synthetic: ")
    assert "draft_layers 12: expected fewer than num_layers 12" in printed.err
    assert printed.err.count("\n") == 1
