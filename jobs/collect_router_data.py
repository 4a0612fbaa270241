"""Tries every draft on prompts, for a router to learn from: `python -m jobs.collect_router_data --config FILE`.

Stopped, and started again with the same configuration, it goes on where it was.
"""

from serve.cluster import connected  # isort: skip  # before all else that imports Ray

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import ray
from pydantic import Field, model_validator

from jobs.command import run_job
from specdecode.config import StrictModel
from specdecode.embedded import resolve_model
from specdecode.errors import ConfigError
from specdecode.evaluation.prompts import load_prompts
from specdecode.parts import Parts
from specdecode.routing.collection import Collector, RouterPrompt, TrialConfig, as_rows
from specdecode.routing.outliers import outlier
from specdecode.routing.records import Record, read_records, write_records
from specdecode.training.checkpoints import load_tokenizer
from specdecode.training.documents import Document, Message, load_documents
from specdecode.training.examples import Formatter
from specdecode.training.prompts import sample_all_prompts

logger = logging.getLogger(__name__)


class PromptSource(StrictModel):
    """Where prompts come from: the built-in ones, a JSONL file, or the documents of a data directory."""

    builtin: Literal["code", "chat", "reasoning", "mixed"] | None = Field(
        default=None, description="those of this domain that come along"
    )
    file: str | None = Field(default=None, description="a JSONL file")
    column: str = Field(default="prompt", description="of the file: a text, or messages of role and content")
    is_chat: bool = Field(default=True, description="whether a text of the file is a message, or to be continued")
    sources: dict[str, float] = Field(default={}, description="weights of the sources of data_dir, see jobs.train_draft")
    data_dir: str = "data/train"
    held_out: bool = Field(default=False, description="of the documents that trainings hold out, or of the others")
    num_prompts: int | None = Field(default=None, gt=0, description="at the most; needed with sources")
    outliers: bool = Field(
        default=False, description="made into prompts like none of theirs, see specdecode/routing/outliers.py"
    )
    max_prompt_length: int = Field(default=512, gt=0, description="tokens; longer prompts are left out")

    @model_validator(mode="after")
    def _check(self) -> "PromptSource":
        if sum(map(bool, (self.builtin, self.file, self.sources))) != 1:
            raise ValueError("expected one of builtin, file and sources")
        if self.outliers and not self.sources:
            raise ValueError("outliers: expected with sources")
        if self.sources and self.num_prompts is None:
            raise ValueError("num_prompts: expected with sources")
        return self


class CollectionConfig(TrialConfig):
    """What is tried, on which prompts, by how many, and where the records go."""

    prompts: dict[str, list[PromptSource]] = Field(min_length=1, description="by domain")
    output: str = Field(default="data/router_training.json", description="all records, as .json or .parquet")
    parts_dir: str = Field(default="data/router", description="the records of each part, as they are done")
    part: int = Field(default=16, gt=0, description="prompts of a part, which is kept whole or not at all")
    num_actors: int = Field(default=1, gt=0, description="processes that each hold the models")
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs of each of them")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs of each of them, or a share of one")


# What may be another the next time that a collection goes on: it does not change the records.
_MAY_CHANGE = {"output", "parts_dir", "num_actors", "num_cpus", "num_gpus"}


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("collect_router_data", "Try every draft on prompts.", CollectionConfig, _run, arguments)


def _run(config: CollectionConfig) -> str:
    records = collect(config)
    errors = Counter(record.error for record in records if record.error is not None)
    told = f"{len(records)} records of {len({record.prompt_id for record in records})} prompts are in {config.output}"
    return told + "".join(f"\n{count} failed: {error}" for error, count in errors.most_common(3))


def collect(config: CollectionConfig) -> list[Record]:
    """Tries all arms on all prompts and writes the records; reads what is there already. Starts a local Ray if there is none.

    Raises:
        ConfigError: the prompts are not there, or the folder holds the records of another configuration.
        ModelError: a model does not load.
    """
    parts = Parts(config.parts_dir, config.model_dump(exclude=_MAY_CHANGE))
    prompts = list(_prompts(config))
    rows = as_rows(prompts, config.part)
    missing = parts.missing(len(rows))
    logger.info("%d prompts, %d of %d parts are there", len(prompts), len(rows) - len(missing), len(rows))
    if missing:
        with connected(quiet=False, dashboard=True):
            _collect([rows[number] for number in missing], config, len(rows))
    records = [record for path in parts.paths(len(rows)) for record in read_records(path)]
    write_records(Path(config.output), records)
    return records


def _collect(rows: list[dict[str, object]], config: CollectionConfig, num_parts: int) -> None:
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Collector,
        fn_constructor_kwargs={
            "config": config.model_dump(include=set(TrialConfig.model_fields)),
            "folder": str(Path(config.parts_dir).absolute()),
        },
        compute=ray.data.ActorPoolStrategy(size=min(config.num_actors, len(rows))),
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus or None,
    )
    for count, row in enumerate(done.iter_rows(), start=1):
        told = (row["number"] + 1, num_parts, row["num_records"], row["num_errors"], len(rows) - count)
        logger.info("part %d of %d: %d records, %d errors; %d parts to go", *told)


def _prompts(config: CollectionConfig) -> Iterator[RouterPrompt]:
    """All prompts in their order, each of them once."""
    formatter = Formatter(load_tokenizer(resolve_model(config.target.model)))
    seen: set[str] = set()
    for domain, sources in config.prompts.items():
        for number, source in enumerate(sources):
            found = list(_documents(source, formatter, [config.seed, number]))[: source.num_prompts]
            for document in found:
                prompt = _prompt(domain, document, formatter)
                if prompt.id not in seen and 0 < len(prompt.tokens) <= source.max_prompt_length:
                    seen.add(prompt.id)
                    yield prompt
    if not seen:
        raise ConfigError("prompts: expected at least one that is short enough, got none")


def _prompt(domain: str, document: Document, formatter: Formatter) -> RouterPrompt:
    """Named by its text, so that it is the same one in every collection."""
    name = hashlib.sha256(json.dumps([document.content, document.is_conversation]).encode()).hexdigest()[:16]
    return RouterPrompt(name, domain, _text(document), document.is_conversation, formatter.prompt(document))


def _text(document: Document) -> str:
    return document.messages[-1].content if document.is_conversation else document.text


def _documents(source: PromptSource, formatter: Formatter, seed: list[int]) -> Iterator[Document]:
    """Documents that end where a model is to go on."""
    if source.builtin:
        for prompt in load_prompts(source.builtin):
            yield _message(prompt.prompt) if prompt.format == "chat" else Document(prompt.prompt)
    elif source.file:
        yield from _file(Path(source.file), source)
    else:
        documents = {name: load_documents(name, source.data_dir) for name in source.sources}
        rng = np.random.default_rng(seed)
        prompts = sample_all_prompts(
            documents,
            source.sources,
            formatter,
            source.num_prompts or 0,
            source.max_prompt_length,
            rng,
            held_out=source.held_out,
        )
        yield from _outliers(prompts, rng) if source.outliers else prompts


def _outliers(prompts: list[Document], rng: np.random.Generator) -> Iterator[Document]:
    """As many, of one in two as a message."""
    texts = [text for text in map(_text, prompts) if text.strip()]
    for _ in prompts:
        text = outlier(texts, rng)
        yield _message(text) if rng.random() < 0.5 else Document(text)


def _file(path: Path, source: PromptSource) -> Iterator[Document]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts: {path} cannot be read: {error}") from error
    yield from (_line(line, source, f"{path}, line {number}") for number, line in enumerate(lines, start=1))


def _line(line: str, source: PromptSource, where: str) -> Document:
    try:
        value = json.loads(line)[source.column]
        if isinstance(value, list):
            return Document(messages=tuple(Message(turn["role"], turn["content"]) for turn in value))
        return _message(str(value)) if source.is_chat else Document(str(value))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"prompts: {where}: expected JSON with {source.column}: {error!r}") from error


def _message(text: str) -> Document:
    return Document(messages=(Message("user", text),))


if __name__ == "__main__":
    sys.exit(main())
