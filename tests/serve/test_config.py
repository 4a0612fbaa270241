"""A deployment's file is checked before anything is started, and each mistake is one line."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from serve.config import DraftModelConfig, NgramConfig, ServeConfig, TlsConfig
from serve.local import load_deployment
from specdecode.config import check_config
from specdecode.errors import ConfigError, ModelError
from tests.serve.conftest import CONFIG, ROOT


def write(tmp_path: Path, change: Any) -> Path:
    values = yaml.safe_load((ROOT / CONFIG).read_text())
    change(values, values["applications"][0]["args"])
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_the_embedded_deployment_loads() -> None:
    deployment = load_deployment(ROOT / CONFIG, port=1234)
    assert deployment.url == "http://127.0.0.1:1234"
    assert deployment.config.model_name == "tiny"


MISTAKES = {
    "unknown top-level key": (lambda file, _: file.update(colour="red"), "colour"),
    "unknown key": (lambda _, args: args.update(colour="red"), "colour: unknown key, got 'red'"),
    "unknown nested key": (lambda _, args: args["target"].update(colour="red"), "target.colour: unknown key"),
    "wrong type": (lambda _, args: args.update(k="four"), "k: input should be a valid integer, got 'four'"),
    "missing target": (lambda _, args: args.pop("target"), "target: missing"),
    "unknown default draft": (lambda _, args: args.update(default_draft="x"), "default_draft: expected one of"),
    "too few rows": (lambda _, args: args["target"].update(max_rows=4), "max_rows: expected more than"),
    "negative k": (lambda _, args: args.update(k=-1), "k: input should be greater than or equal to 0, got -1"),
    "draft called none": (lambda _, args: args["drafts"].update(none=args["drafts"]["code"]), "drafts: none is how"),
    "draft called as the target": (lambda _, args: args.update(served_model_name="code"), "drafts: code is the target's name"),
    "unknown verifier": (lambda _, args: args.update(verifier="x"), "verifier: input should be 'rejection', 'block' or"),
    "unknown method": (
        lambda _, args: args["drafts"].update(x={"method": "eagle"}),
        "drafts.x: expected a draft of method draft_model or ngram, got {'method': 'eagle'}",
    ),
    "draft without model": (lambda _, args: args["drafts"].update(x={}), "drafts.x.draft_model.model: missing"),
    "model of a lookup": (
        lambda _, args: args["drafts"]["lookup"].update(model="tiny/draft-code"),
        "drafts.lookup.ngram.model: unknown key, got 'tiny/draft-code'",
    ),
    "confidence of a lookup": (
        lambda _, args: args["drafts"]["lookup"].update(min_confidence=0.5),
        "drafts.lookup.ngram.min_confidence: unknown key, got 0.5",
    ),
    "empty range of a lookup": (
        lambda _, args: args["drafts"]["lookup"].update(prompt_lookup_max=1),
        "prompt_lookup_min: expected at most prompt_lookup_max (1), got 2",
    ),
    "no lookup to limit": (
        lambda _, args: args["drafts"]["code"].update(prompt_lookup_max=3),
        "prompt_lookup_max: of use only with lookup_first, or with method ngram",
    ),
    "too much confidence": (
        lambda _, args: args["drafts"]["code"].update(min_confidence=1.5),
        "min_confidence: input should be less than or equal to 1, got 1.5",
    ),
    "another application": (lambda file, _: file["applications"][0].update(import_path="a:b"), "import_path serve.app:build"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(tmp_path: Path, change: Any, message: str) -> None:
    file = write(tmp_path, change)
    with pytest.raises(ConfigError) as caught:
        load_deployment(file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_draft_is_a_model_unless_it_says_otherwise() -> None:
    drafts = load_deployment(ROOT / CONFIG).config.drafts
    assert isinstance(drafts["code"], DraftModelConfig)
    assert drafts["lookup"] == NgramConfig(method="ngram", prompt_lookup_max=4, prompt_lookup_min=2)


def test_a_model_may_look_up_first() -> None:
    draft = {"model": "tiny/draft-code", "lookup_first": True, "prompt_lookup_max": 6, "min_confidence": 0.3}
    config = ServeConfig.model_validate({"target": {"model": "tiny/target"}, "drafts": {"code": draft}})
    assert isinstance(config.drafts["code"], DraftModelConfig)
    assert config.verifier == "rejection"


def test_a_draft_with_another_tokenizer_is_taken(tmp_path: Path, foreign_draft: str) -> None:
    file = write(tmp_path, lambda _, args: args["drafts"]["code"].update(model=foreign_draft))
    assert load_deployment(file).config.drafts.keys() >= {"code", "lookup"}


def test_a_draft_that_shares_too_few_tokens_is_refused(tmp_path: Path, tokenizer_folder: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_folder, folder)
    LlamaConfig(vocab_size=320).save_pretrained(folder)
    file = write(tmp_path, lambda _, args: args["drafts"]["code"].update(model=str(folder)))
    with pytest.raises(ModelError, match=r"shares \d+ of the 4096 tokens .* of target 'tiny/target': expected at least 10%"):
        load_deployment(file)


def test_a_model_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, lambda _, args: args["target"].update(model="tiny/nothing"))
    with pytest.raises(ModelError, match=r"the embedded models are .*tiny/target"):
        load_deployment(file)


def test_the_command_says_it_in_one_line_and_exits_with_2(tmp_path: Path) -> None:
    file = write(tmp_path, lambda _, args: args.update(colour="red"))
    command = [sys.executable, "-m", "specdecode.cli", "serve", "--config", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("specdecode: ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("exchange", "expected"),
    [
        ({"ports": [20010, 20000]}, "exchange: ports: expected two port numbers, the first not above the last"),
        ({"ports": [0, 5]}, "exchange: ports: expected two port numbers"),
        ({"ports": [20000]}, "exchange.ports"),
        ({"transport": "udp"}, "exchange.transport"),
        ({"max_sessions": 0}, "exchange.max_sessions"),
        ({"tls": {"certificate": "a.pem"}}, "exchange.tls.key"),
    ],
)
def test_a_mistake_in_the_exchange_is_one_line(exchange: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_config({"target": {"model": "tiny/target"}, "exchange": exchange}, ServeConfig, where="file")


def test_certificates_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_text("nothing")
    missing, garbage = str(tmp_path / "b.pem"), str(tmp_path / "a.pem")
    for file in (missing, garbage):
        tls = TlsConfig(certificate=file, key=file, authority=file)
        for context in (tls.server_context, tls.client_context):
            with pytest.raises(ConfigError, match=f"^exchange.tls: .*{file}.* cannot be used"):
                context()


def test_the_ports_of_the_exchange_are_a_range() -> None:
    config = check_config(
        {"target": {"model": "tiny/target"}, "exchange": {"ports": [20000, 20002]}}, ServeConfig, where="file"
    )
    assert list(config.exchange.port_range or []) == [20000, 20001, 20002]
