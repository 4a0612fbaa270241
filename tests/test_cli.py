"""The command line: the text is the target's, the figures are there, and a mistake is one line and exit status 2."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specdecode import create_backend, speculative_decode
from specdecode.cli import main
from specdecode.text import Tokenizer

PROMPT = "def read_lines(path):\n"


def generate(*options: str) -> int:
    return main(["generate", "--model", "tiny/target", "--prompt", PROMPT, "--max-tokens", "24", *options])


def expected(**options: Any) -> str:
    tokenizer = Tokenizer("tiny/target")
    tokens = tokenizer.encode(PROMPT)
    draft = create_backend("tiny/draft-code")
    output, _ = speculative_decode(create_backend("tiny/target"), draft, torch.tensor([tokens]), 24, **options)
    return tokenizer.decode(output[0, len(tokens) :].tolist()) + "\n"


@pytest.mark.parametrize("options", [[], ["--draft", "tiny/draft-code"], ["--draft", "tiny/draft-chat", "--K", "2"]])
def test_generate_prints_the_targets_text_and_one_line_of_figures(
    capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert generate(*options) == 0
    printed = capsys.readouterr()
    assert printed.out == expected()
    assert printed.err.count("\n") == 1
    assert "tok/s" in printed.err
    assert "acceptance" in printed.err


def test_generate_samples_with_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--draft", "tiny/draft-code", "--temperature", "0.9", "--top-p", "0.9", "--top-k", "50", "--seed", "7"]
    assert generate(*options) == 0
    assert capsys.readouterr().out == expected(temperature=0.9, top_p=0.9, top_k=50, seed=7)


def test_generate_verifies_as_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--draft", "tiny/draft-code", "--temperature", "1", "--seed", "3", "--verifier", "block"]
    assert generate(*options) == 0
    assert capsys.readouterr().out == expected(temperature=1.0, seed=3, verifier="block")


def test_generate_reads_a_file_and_options_override_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "generate.yaml"
    file.write_text("model: tiny/target\nprompt: other\nmax_tokens: 24\n")
    assert main(["generate", "--config", str(file), "--prompt", PROMPT]) == 0
    assert capsys.readouterr().out == expected()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--K", "-1"], "K: expected at least 0, got -1"),
        (["--temperature", "-1"], "temperature: expected a number of at least 0, got -1.0"),
        (["--top-p", "0"], "top_p: expected a number in (0, 1], got 0.0"),
        (["--top-p", "1.1"], "top_p: expected a number in (0, 1], got 1.1"),
        (["--max-tokens", "0"], "max_tokens: expected at least 1, got 0"),
        (["--max-tokens", "100000"], "max_tokens"),
        (["--prompt", ""], "the prompt is empty"),
        (["--model", "tiny/nothing"], "the embedded models are"),
        (["--draft", "tiny/nothing"], "the embedded models are"),
        (["--verifier", "guess"], "verifier: input should be 'rejection' or 'block', got 'guess'"),
        (["--dtype", "int7"], "dtype 'int7'"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
        (["--device", "toaster"], "device 'toaster'"),
        (["--config", "missing.yaml"], "missing.yaml: cannot be read"),
    ],
)
def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert generate(*options) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("specdecode: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_a_draft_of_another_vocabulary_is_refused(capsys: pytest.CaptureFixture[str], draft_folder: str) -> None:
    assert generate("--draft", draft_folder) == 2
    assert "has another vocabulary than target 'tiny/target'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["model: tiny/target\nprompt: a\ncolour: red\n", "model: 5\nprompt: a\n", "model: tiny/target\n"]
)
def test_a_bad_file_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    file = tmp_path / "generate.yaml"
    file.write_text(text)
    assert main(["generate", "--config", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_benchmark_compares_every_draft_with_plain_decoding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    small = ["--set", "num_prompts=1", "--set", "max_tokens=8", "--set", "domains=[code]"]
    assert main(["benchmark", "--config", "configs/tiny/benchmark.yaml", "--output", str(records), *small]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[1] for row in rows] == ["none", "generic", "code", "chat", "reasoning"]
    assert {row[-1] for row in rows} == {"0"}  # no answer differs from the plain one
    assert len([json.loads(line) for line in records.read_text().splitlines()]) == 5
