"""A draft that was made worse is improved by what it was asked, and takes a share; one that is not better changes nothing."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs import improve
from specdecode.embedded import resolve_model
from specdecode.evaluation.prompts import DOMAINS, load_prompts
from specdecode.routing.records import Record


@pytest.fixture(scope="module")
def worse(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded generic draft with noise."""
    folder = tmp_path_factory.mktemp("worse")
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny/draft-generic"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.5 * weights.std() * torch.randn(weights.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_model("tiny/draft-generic")).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def values(worse: str, tmp_path: Path) -> dict[str, Any]:
    args = {
        "target": {"model": "tiny/target"},
        "drafts": {"generic": {"model": worse, "placement": "local"}, "code": {"model": "tiny/draft-code"}},
    }
    deployed = {"applications": [{"name": "a", "route_prefix": "/", "import_path": "serve.app:build", "args": args}]}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(deployed))
    records = [
        Record(prompt.id, "served", prompt.prompt, prompt.format == "chat", 9, arm, mode="served")
        for domain in DOMAINS
        for prompt in load_prompts(domain)[:40]
        for arm in ("generic", "code")
    ]
    unsaid = [Record("unsaid", "served", "", True, 9, "generic", mode="served")]
    lines = [json.dumps(asdict(record)) for record in [*records, *unsaid]]
    (tmp_path / "records.jsonl").write_text("\n".join(lines) + "\n")
    return {
        "serve_config": str(tmp_path / "serve.yaml"),
        "draft": "generic",
        "records": [str(tmp_path)],
        "output_config": str(tmp_path / "next.yaml"),
        "max_new_tokens": 24,
        "min_compared": 10,
        "share": 0.25,
        "training": {
            "output_dir": str(tmp_path / "improved"),
            "num_train_steps": 60,
            "per_device_batch_size": 4,
            "sequence_length": 128,
            "learning_rate": 0.002,
            "num_warmup_steps": 2,
            "validate_every": 20,
            "num_validation_blocks": 2,
            "num_workers": 0,
            "K": 4,
            "precision": "float32",
        },
    }


def run(values: dict[str, Any], folder: Path) -> int:
    (folder / "improve.yaml").write_text(yaml.safe_dump(values))
    return improve.main(["--config", str(folder / "improve.yaml")])


def test_a_better_draft_takes_a_share_of_the_requests(
    values: dict[str, Any], worse: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tmp_path / "serve.yaml").read_text()
    assert run(values, tmp_path) == 0
    out = capsys.readouterr().out
    assert "gives it 25% of generic's requests" in out
    [application] = yaml.safe_load((tmp_path / "next.yaml").read_text())["applications"]
    assert application["args"]["canaries"] == {"generic": {"draft": "generic-next", "share": 0.25}}
    drafts = application["args"]["drafts"]
    assert drafts["generic"]["model"] == worse
    assert drafts["generic-next"] == {"model": str(tmp_path / "improved/best"), "placement": "local"}
    AutoModelForCausalLM.from_pretrained(drafts["generic-next"]["model"])
    assert (tmp_path / "serve.yaml").read_text() == before


def test_a_draft_that_is_not_better_changes_nothing(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["training"] |= {"learning_rate": 1e-9, "num_train_steps": 1, "validate_every": 1}
    assert run(values, tmp_path) == 1
    assert "not better by more than chance; no configuration is written" in capsys.readouterr().out
    assert not (tmp_path / "next.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft": "chat"}, r"draft: expected one of ['code', 'generic'], got 'chat'"),
        ({"min_compared": 500}, "expected at least 500 prompts to compare on, got"),
        ({"records": ["missing.jsonl"]}, "missing.jsonl: cannot be read as records"),
        ({"serve_config": "missing.yaml"}, "missing.yaml: cannot be read"),
    ],
)
def test_a_mistake_is_one_line(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert run(values | changes, tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
