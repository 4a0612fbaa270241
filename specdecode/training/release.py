"""Trained checkpoints of a family in, its published folders with model cards out.

`python -m specdecode.training.release --config configs/tiny/train_release.yaml`
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from specdecode.config import StrictModel, load_config
from specdecode.errors import ConfigError, UserError
from specdecode.training.acceptance import greedy_acceptance
from specdecode.training.blocks import encode_chat, encode_text, end_of_text
from specdecode.training.checkpoints import load_model, load_tokenizer, save_checkpoint
from specdecode.training.continuations import Continuation, continue_prompts
from specdecode.training.documents import Document, Message
from specdecode.training.model_card import AcceptanceTable, describe
from specdecode.training.prompts import sample_prompts
from specdecode.training.sources import DraftDataConfig, load_split, source_weights
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
    """The greedy acceptance of every draft on built-in and on held-out prompts of every domain but `generic`."""
    checkpoints = Path(config.checkpoints_dir)
    target_folder = str(checkpoints / config.target / "best")
    target, tokenizer = load_model(target_folder).eval(), load_tokenizer(target_folder)
    drafts = {name: load_model(str(checkpoints / name / "best")).eval() for name in config.drafts.values()}
    rates: dict[tuple[str, str, str], float] = {}
    lengths: dict[tuple[str, str], float] = {}
    for domain, name in config.drafts.items():
        if domain == "generic":
            continue
        prompt_sets = {
            "built-in": read_prompts(Path(config.prompts_dir) / f"{domain}.jsonl", tokenizer)[: config.num_prompts],
            "held-out": _held_out_prompts(runs[name], tokenizer, config),
        }
        for origin, prompts in prompt_sets.items():
            continuations = continue_prompts(
                target, prompts, config.max_new_tokens, temperature=0, batch_size=64, pad_id=end_of_text(tokenizer)
            )
            lengths[origin, domain] = _mean_length(continuations)
            for draft_name, draft in drafts.items():
                rates[origin, draft_name, domain] = greedy_acceptance(draft, continuations, config.k).rate
    return AcceptanceTable(config.k, config.max_new_tokens, rates, lengths)


def read_prompts(path: Path, tokenizer: Any) -> list[list[int]]:
    """The prompts of a JSONL file with the fields `format` (raw or chat) and `prompt`, as ids."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [_encode_prompt(row, tokenizer) for row in rows]


def _encode_prompt(row: dict[str, str], tokenizer: Any) -> list[int]:
    if row["format"] == "raw":
        return encode_text(row["prompt"], tokenizer)
    question = Document(messages=(Message("user", row["prompt"]),))
    return encode_chat(question, tokenizer, add_generation_prompt=True)


def _held_out_prompts(run: dict[str, Any], tokenizer: Any, config: ReleaseConfig) -> list[list[int]]:
    """Prompts from the documents that the draft's training held out, from each source in proportion to its weight."""
    data = DraftDataConfig(**run["config"]["data"])
    _, held_out = load_split(data)
    weights, rng = source_weights(data), np.random.default_rng(config.seed)
    total = sum(weights.values())
    max_length = run["config"]["distillation"]["max_prompt_length"]
    return [
        prompt
        for source, found in held_out.items()
        for prompt in sample_prompts(found, tokenizer, round(config.num_prompts * weights[source] / total), max_length, rng)
    ]


def _mean_length(continuations: list[Continuation]) -> float:
    return sum(len(continuation.tokens) for continuation in continuations) / len(continuations)


def _read_run(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.exists():
        raise ConfigError(f"checkpoints_dir: expected a finished training in {folder}, but {path} does not exist")
    run = dict(json.loads(path.read_text(encoding="utf-8")))
    start = Path(run["config"].get("model", {}).get("draft_model", "")).parent / "run.json"
    if start.exists():  # a second stage: the card tells of the first one too
        run["start"] = json.loads(start.read_text(encoding="utf-8"))
    return run


def main(arguments: list[str] | None = None) -> int:
    """Publishes a family and prints its acceptance; returns the exit status: 0, or 2 for what the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m specdecode.training.release", description="Publish a model family.")
    parser.add_argument("--config", required=True, help="a YAML file such as configs/tiny/train_release.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    try:
        table = release(load_config(options.config, ReleaseConfig, options.overrides))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table.as_markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
