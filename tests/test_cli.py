"""The command line: the text is the target's, the figures are there, and a mistake is one line and exit status 2."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from serve.config import ServeConfig
from specdecode import create_backend, speculative_decode
from specdecode.cli import main
from specdecode.config import check_config
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


def test_generate_takes_the_parameters_by_their_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--temperature", "0.8", "--min-p", "0.05", "--repetition-penalty", "1.2", "--presence-penalty", "0.5"]
    options += ["--frequency-penalty", "0.3", "--min-tokens", "9", "--ignore-eos", "--seed", "5", "--bad-words", "file"]
    file = tmp_path / "generate.yaml"
    file.write_text("logit_bias: {300: 2.0}\n")
    assert generate("--draft", "tiny/draft-code", "--verifier", "coupled", "--config", str(file), *options) == 0
    printed = capsys.readouterr().out
    assert "file" not in printed
    words = Tokenizer("tiny/target").spellings(["file"])
    parameters = {"temperature": 0.8, "min_p": 0.05, "repetition_penalty": 1.2, "presence_penalty": 0.5}
    parameters |= {"frequency_penalty": 0.3, "min_tokens": 9, "ignore_eos": True, "seed": 5, "bad_words_ids": words}
    assert printed == expected(**parameters, logit_bias={300: 2.0}, verifier="coupled")


@pytest.mark.parametrize(
    "options", [["--lookup"], ["--lookup", "--draft", "tiny/draft-code"], ["--adaptive"], ["--min-confidence", "0.5"]]
)
def test_generate_drafts_in_other_ways(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert generate("--draft", "tiny/draft-chat", *options) == 0
    assert capsys.readouterr().out == expected()


def test_generate_ends_before_a_stop_string(capsys: pytest.CaptureFixture[str]) -> None:
    text = expected().rstrip("\n")
    stop = text[len(text) // 2 :][:5]
    assert generate("--draft", "tiny/draft-code", "--stop", stop) == 0
    assert capsys.readouterr().out == text[: text.index(stop)] + "\n"


def test_generate_prints_several_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--draft", "tiny/draft-code", "--temperature", "1", "--seed", "3", "--n", "2") == 0
    answers = [expected(temperature=1.0, seed=seed) for seed in (3, 4)]
    assert capsys.readouterr().out == f"--- 1 of 2\n{answers[0]}--- 2 of 2\n{answers[1]}"


def test_config_prints_the_whole_file_and_its_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "configs/tiny/serve.yaml"]) == 0
    printed = capsys.readouterr().out
    values = yaml.safe_load(printed)
    check_config(values, ServeConfig, where="printed")
    assert values["target"]["engine"]["draft_length"] == "adaptive"
    memory = r"^# target: weights 27\.\d MB \+ cache \d+ rows x \d+ tokens x [\d.]+ KB = [\d.]+ [MG]B$"
    assert re.search(memory, printed, re.M)


def test_overhead_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["vocab_size=500", "batch=2", "K=2", "length=32", "num_rounds=2"]
    assert main(["overhead", *(part for value in small for part in ("--set", value))]) == 0
    printed = capsys.readouterr().out
    for words in ("greedy, all penalties", "not in a forward pass", "shared with a request before"):
        assert words in printed


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
        (["--temperature", "-1"], "temperature: expected a number in [0, 1e+30], got -1.0"),
        (["--top-p", "0"], "top_p: expected a number in (0, 1], got 0.0"),
        (["--top-p", "1.1"], "top_p: expected a number in (0, 1], got 1.1"),
        (["--max-tokens", "0"], "max_tokens: expected at least 1, got 0"),
        (["--max-tokens", "100000"], "max_tokens"),
        (["--prompt", ""], "the prompt is empty"),
        (["--model", "tiny/nothing"], "the embedded models are"),
        (["--draft", "tiny/nothing"], "the embedded models are"),
        (["--verifier", "guess"], "verifier: input should be 'rejection', 'block' or 'coupled', got 'guess'"),
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


def test_a_draft_of_another_vocabulary_without_a_tokenizer_is_refused(
    capsys: pytest.CaptureFixture[str], draft_folder: str
) -> None:
    assert generate("--draft", draft_folder) == 2
    assert f"tokenizer of {draft_folder!r} cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["model: tiny/target\nprompt: a\ncolour: red\n", "model: 5\nprompt: a\n", "model: tiny/target\n"]
)
def test_a_bad_file_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    file = tmp_path / "generate.yaml"
    file.write_text(text)
    assert main(["generate", "--config", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_benchmark_is_run_reported_on_and_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = ["--config", "configs/tiny/benchmark.yaml"]
    small = ["--set", "max_new_tokens=8", "--set", "datasets=[{name: code, limit: 2}, {name: chat, limit: 1}]"]
    some = ["--experiments", "baseline,generic_draft,specialized_drafts"]
    folder = tmp_path / "results"
    assert main(["benchmark", *files, *small, *some, "--set", f"output_dir={folder}"]) == 0
    told = capsys.readouterr().out
    rows = [line.split() for line in told.splitlines()[1:-1]]
    drafts = ["none", "generic", "code", "chat", "reasoning"]
    assert [row[1] for row in rows] == [draft for draft in drafts for _ in range(3)]  # each domain, and all
    assert {row[-1] for row in rows} == {"0"}  # no answer differs from the plain one
    written = (folder / "summary.json").read_bytes()
    (folder / "summary.json").unlink()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == told
    assert (folder / "summary.json").read_bytes() == written  # byte for byte, from the records alone
    assert main(["report", str(folder), "--json"]) == 0
    assert capsys.readouterr().out.encode() == written
    assert main(["compare", str(folder), str(folder), "--json"]) == 0
    changes = json.loads(capsys.readouterr().out)
    assert {(change["verdict"], change["num_different"]) for change in changes} == {("no difference", 0)}
    assert main(["compare", str(folder), str(folder)]) == 0
    assert capsys.readouterr().out.count("no difference") == len(changes) == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiments", "baseline,generic"], "experiments.1: input should be 'baseline'"),
        (["--set", "datasets=[{name: gsm9k}]"], "datasets.0: name: expected one of alpaca"),
        (["--set", "datasets=[{name: gsm8k, path: nowhere.jsonl}]"], "nowhere.jsonl: cannot be read as rows"),
    ],
)
def test_a_bad_benchmark_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["benchmark", "--config", "configs/tiny/benchmark.yaml", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_results_that_are_none_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["report", str(tmp_path)], ["compare", str(tmp_path), str(tmp_path)]):
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
