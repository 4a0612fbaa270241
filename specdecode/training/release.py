"""Trained checkpoints of a family in, its published folders with model cards out."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from specdecode.backends.backend import create_backend
from specdecode.config import StrictModel
from specdecode.decoding.drafters import NoDrafter
from specdecode.decoding.sequence import SamplingParams
from specdecode.errors import ConfigError
from specdecode.training.acceptance import score
from specdecode.training.checkpoints import load_model, load_tokenizer, save_checkpoint
from specdecode.training.completions import complete
from specdecode.training.data import DataConfig
from specdecode.training.documents import Document, Message, load_documents
from specdecode.training.examples import Formatter
from specdecode.training.model_card import AcceptanceTable, describe
from specdecode.training.prompts import sample_all_prompts
from specdecode.training.trainer import replace_folder


class ReleaseConfig(StrictModel):
    """A target and its drafts, each trained into CHECKPOINTS_DIR/NAME; `prompts_dir` holds one JSONL file per domain."""

    checkpoints_dir: str
    prompts_dir: str
    output_dir: str
    target: str = "target"
    drafts: dict[str, str]
    k: int = 4
    num_prompts: int = 60
    max_new_tokens: int = 128
    seed: int = 0


def release(config: ReleaseConfig) -> AcceptanceTable:
    """Measures the acceptance of every draft in every domain and publishes all models; returns what was measured.

    Raises:
        ConfigError: a model of the family has not been trained yet.
    """
    checkpoints = Path(config.checkpoints_dir)
    names = [config.target, *config.drafts.values()]
    runs = {name: _read_run(checkpoints / name) for name in names}
    table = measure(config, runs)
    for name in names:
        model, tokenizer = load_model(str(checkpoints / name / "best")), load_tokenizer(str(checkpoints / name / "best"))

        def save(folder: Path, name: str = name, model: Any = model, tokenizer: Any = tokenizer) -> None:
            save_checkpoint(model, tokenizer, folder)
            (folder / "README.md").write_text(describe(name, runs[name], table), encoding="utf-8")

        replace_folder(Path(config.output_dir) / name, save)
    return table


def measure(config: ReleaseConfig, runs: dict[str, dict[str, Any]]) -> AcceptanceTable:
    """What of every draft's guesses is accepted, after built-in and held-out prompts of every domain but `generic`."""
    checkpoints = Path(config.checkpoints_dir)
    folder = str(checkpoints / config.target / "best")
    target, formatter, backend = load_model(folder).eval(), Formatter(load_tokenizer(folder)), create_backend(folder)
    drafts = {name: load_model(str(checkpoints / name / "best")).eval() for name in config.drafts.values()}
    table = AcceptanceTable(config.k, config.max_new_tokens, {}, {})
    for domain, name in config.drafts.items():
        if domain == "generic":
            continue
        prompt_sets = {
            "built-in": read_prompts(Path(config.prompts_dir) / f"{domain}.jsonl", formatter)[: config.num_prompts],
            "held-out": held_out_prompts(
                DataConfig(**runs[name]["config"]["data"]),
                formatter,
                config.num_prompts,
                _longest_prompt(runs[name]),
                config.seed,
            ),
        }
        for origin, prompts in prompt_sets.items():
            answers = complete(prompts, backend, NoDrafter(), lambda _: SamplingParams(max_tokens=config.max_new_tokens))
            table.mean_lengths[origin, domain] = sum(len(answer.tokens) for answer in answers) / len(answers)
            for draft_name, draft in drafts.items():
                table.scores[origin, draft_name, domain] = score(draft, target, answers, config.k)
    return table


def read_prompts(path: Path, formatter: Formatter) -> list[list[int]]:
    """The prompts of a JSONL file with the fields `format` (raw or chat) and `prompt`, as ids."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [formatter.prompt(_prompt(row)) for row in rows]


def _prompt(row: dict[str, str]) -> Document:
    return Document(row["prompt"]) if row["format"] == "raw" else Document(messages=(Message("user", row["prompt"]),))


def held_out_prompts(data: DataConfig, formatter: Formatter, num_prompts: int, max_length: int, seed: int) -> list[list[int]]:
    """Prompts from the documents of a data directory that training holds out.

    Raises:
        ConfigError: the data are not there, or there are no such prompts.
    """
    documents = {source: load_documents(source, data.data_dir) for source in data.sources}
    rng = np.random.default_rng(seed)
    return sample_all_prompts(documents, data.sources, formatter, num_prompts, max_length, rng, held_out=True)


def _longest_prompt(run: dict[str, Any]) -> int:
    return int(run["config"]["distillation"]["completions"]["max_prompt_length"])


def _read_run(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.exists():
        raise ConfigError(f"checkpoints_dir: expected a finished training in {folder}, but {path} does not exist")
    run = dict(json.loads(path.read_text(encoding="utf-8")))
    start = Path(run["config"].get("model", {}).get("draft_model", "")).parent / "run.json"
    if start.exists():  # a second stage: the card tells of the first one too
        run["start"] = json.loads(start.read_text(encoding="utf-8"))
    return run
