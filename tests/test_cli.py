"""The command line: the text is the target's, the figures are there, and a mistake is one line and exit status 2."""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from serve.config import ServeConfig
from specdecode import create_backend, speculative_decode
from specdecode.cli import main, parser
from specdecode.config import check_config
from specdecode.errors import ConfigError
from specdecode.evaluation.benchmark import read_run
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


def test_generate_keeps_to_a_schema_or_an_expression(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps({"type": "array", "items": {"enum": ["a", 7]}, "minItems": 2, "maxItems": 2}))
    assert generate("--draft", "tiny/draft-code", "--json-schema", str(file)) == 0
    assert set(json.loads(capsys.readouterr().out)) <= {"a", 7}
    assert generate("--draft", "tiny/draft-code", "--regex", "[0-9]{3}(-[a-c]){2}") == 0
    assert re.fullmatch("[0-9]{3}(-[a-c]){2}\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "options", [["--regex", "("], ["--json-schema", "no/such/file"], ["--regex", "a", "--json-schema", "b"]]
)
def test_generate_refuses_a_grammar_that_cannot_be_used(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert generate(*options) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"specdecode: {options[0].removeprefix('--').replace('-', '_')}: ")


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
    memory = r"^# target: weights 27\.\d MB \+ packed 27\.\d MB \+ cache \d+ rows x \d+ tokens x [\d.]+ KB = [\d.]+ [MG]B$"
    assert re.search(memory, printed, re.M)


FILES = [
    "cluster.yaml",
    *sorted(str(file) for folder in ("configs", "configs/tiny", "configs/cluster") for file in Path(folder).glob("*.yaml")),
]


@pytest.mark.parametrize("file", FILES)
def test_config_finds_what_every_file_is_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setattr("specdecode.commands.config._estimate", lambda model: f"of {model.model}")  # no hub, no seconds
    monkeypatch.setattr("specdecode.commands.config._training_memory", lambda name: f"of {name}")
    monkeypatch.setattr("specdecode.commands.config._compare_vocabularies", lambda _: None)
    assert main(["config", file]) == 0
    printed = capsys.readouterr().out
    first = next(yaml.safe_load_all(Path(file).read_text()))
    whole = yaml.safe_load(printed)
    assert printed.startswith(f"# {Path(file).name}: for ")
    assert "applications" in first or "serveConfigV2" in str(first) or set(first) <= set(whole)  # with its defaults
    assert main(["config", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"] == whole


def test_config_takes_a_kind_and_keys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("K: 3\nbatch: 2\n")
    assert main(["config", str(file), "--kind", "overhead", "--set", "length=5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "overhead"
    assert (found["config"]["K"], found["config"]["length"]) == (3, 5)
    assert found["memory"]["target"]["num_weight_bytes"] > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("K: 3\n", "expected --kind, as it may be one of"),
        ("data: {}\ntraining: {}\n", "missing"),
        ("cluster_name: some\n", "some.yaml"),
        ("kind: RayService\nspec: {}\n", "spec.serveConfigV2: expected a Serve config file"),
        ("target: {model: tiny/target}\ndatasets: [{name: code}]\noutput_dir: a\ncolour: red\n", "colour: unknown key"),
    ],
)
def test_config_says_what_is_wrong_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(text)
    assert main(["config", str(file)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_models_are_described(capsys: pytest.CaptureFixture[str], draft_folder: str) -> None:
    assert main(["models"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]} == {
        *("tiny/target", "tiny/router", "tiny/draft-generic", "tiny/draft-code", "tiny/draft-chat", "tiny/draft-reasoning")
    }
    assert main(["models", "tiny/target", draft_folder, "--json"]) == 0
    target, draft = json.loads(capsys.readouterr().out)
    backend = create_backend("tiny/target")
    assert target["kind"] == "target"
    assert target["num_parameters"] == sum(weights.numel() for weights in backend.model.parameters())  # type: ignore[attr-defined]
    assert (target["vocab_size"], target["max_length"]) == (backend.vocab_size, backend.max_length)
    assert draft["num_bytes"] == sum(file.stat().st_size for file in Path(draft_folder).iterdir())
    assert main(["models", "--config", "configs/tiny/benchmark.yaml", "--json"]) == 0
    kinds = {model["name"]: model["kind"] for model in json.loads(capsys.readouterr().out)}
    assert kinds == {"tiny/target": "target", "tiny/router": "router"} | {
        f"tiny/draft-{name}": "draft" for name in ("generic", "code", "chat", "reasoning")
    }


def test_a_model_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "tiny/nothing"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def commands() -> dict[str, argparse.ArgumentParser]:
    [action] = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(action.choices)


@pytest.mark.parametrize("name", commands())
def test_the_help_of_every_command_has_an_example_that_parses(name: str) -> None:
    examples = re.findall(rf"^ *(?:HF_TOKEN=\S+ )?specdecode ({name}\b.*)$", commands()[name].format_help(), re.M)
    assert examples
    for example in examples:
        assert parser().parse_args(shlex.split(example.partition(" > ")[0], comments=True)).command == name


def test_the_version_and_the_exit_statuses_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"specdecode \d+\.\d+\.\d+\n", capsys.readouterr().out)
    told = parser().format_help()
    assert all(re.search(rf"^  {status} ", told, re.M) for status in (0, 1, 2, 130))
    for mistake in ([], ["nonsense"], ["generate", "--colour"]):
        with pytest.raises(SystemExit) as ended:
            main(mistake)
        assert ended.value.code == 2


def test_completion_knows_every_command_and_is_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert all(name in script for name in commands())
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out + 'COMP_WORDS=(specdecode ben) COMP_CWORD=1; _shtab_specdecode; echo "${COMPREPLY[@]}"'
    completed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert completed.stdout.split() == ["benchmark"]


def test_generate_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--draft", "tiny/draft-code", "--json", "--n", "2") == 0
    printed = capsys.readouterr()
    answers = json.loads(printed.out)
    assert [answer["text"] + "\n" for answer in answers] == [expected()] * 2
    assert answers[0]["num_generated"] == 24
    assert printed.err == ""


def test_nobody_reads_to_the_end() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "specdecode.cli", "completion", "bash"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_an_interrupted_benchmark_leaves_nothing_running_and_goes_on(tmp_path: Path) -> None:
    arguments = ["--set", "max_new_tokens=48", "--set", "part=1", "--set", f"output_dir={tmp_path}"]
    arguments += ["--set", "datasets=[{name: code, limit: 40}]", "--experiments", "baseline,generic_draft"]
    command = [sys.executable, "-m", "specdecode.cli", "benchmark", "--config", "configs/tiny/benchmark.yaml", *arguments]
    benchmark = subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )
    until = time.monotonic() + 120
    while not (done := list(tmp_path.glob("records/part-*.parquet"))) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(benchmark.pid, signal.SIGINT)  # as a terminal does
    _, told = benchmark.communicate(timeout=60)
    assert done
    assert benchmark.returncode == 130
    assert told == ""  # quiet off a terminal, and no traceback
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        os.killpg(benchmark.pid, 0)
    with pytest.raises(ConfigError, match="run it again"):
        read_run(tmp_path)


def test_overhead_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["vocab_size=500", "batch=2", "K=2", "length=32", "num_rounds=2"]
    assert main(["overhead", *(part for value in small for part in ("--set", value))]) == 0
    printed = capsys.readouterr().out
    for words in ("greedy, all penalties", "not in a forward pass", "shared with a request before"):
        assert words in printed
    assert main(["overhead", "--json", *(part for value in small for part in ("--set", value))]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"overhead", "share", "prefix_reuse", "masks"}
    assert all(isinstance(row["total_ms"], float) for row in found["overhead"])


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
    rows = [line.split() for line in told.splitlines()[1:-2]]
    drafts = ["none", "generic", "code", "chat", "reasoning"]
    assert [row[1] for row in rows] == [draft for draft in drafts for _ in range(3)]  # each domain, and all
    assert {row[-1] for row in rows} == {"0"}  # no answer differs from the plain one
    assert told.splitlines()[-1] == f"the report is {folder / 'report.html'}"
    written, page = ((folder / name).read_bytes() for name in ("summary.json", "report.html"))
    for name in ("summary.json", "report.html"):
        (folder / name).unlink()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == told
    assert (folder / "summary.json").read_bytes() == written  # byte for byte, from the records alone
    assert (folder / "report.html").read_bytes() == page
    (folder / "report.html").unlink()
    assert main(["report", str(folder), "--json", "--no-report"]) == 0
    assert not (folder / "report.html").exists()
    assert capsys.readouterr().out.encode() == written
    assert main(["report", str(folder), "--markdown", "--no-report"]) == 0
    about, machine, *table = capsys.readouterr().out.split("\n\n")
    assert about == "Target `tiny/target` on 3 questions of code, chat, at the most 8 tokens for each answer."
    assert machine.startswith("Measured on ")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]
    assert [row[1] for row in cells] == [row[1] for row in rows]
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
