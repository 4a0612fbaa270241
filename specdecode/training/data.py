"""Rows of data sets in, blocks of tokens on disk out: what a training reads. Knows nothing of where rows come from.

Which documents are held out is a function of their content, and the order of all others one of the configuration and the seed:
neither how many processes there are nor which of them is quicker changes what is learned when.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from pydantic import Field, model_validator

from specdecode.config import StrictModel
from specdecode.errors import ConfigError
from specdecode.training.checkpoints import load_tokenizer
from specdecode.training.documents import Document, Message, is_held_out
from specdecode.training.examples import Example, Formatter
from specdecode.training.packing import Block, cycle, interleave, pack

TRAINING, VALIDATION = "training.parquet", "validation.parquet"  # the blocks of a run

Domain = Literal["code", "chat", "reasoning", "generic"]

_COLUMNS: dict[Domain, dict[str, str]] = {
    "code": {"text": "content"},
    "chat": {"messages": "messages"},
    "reasoning": {"prompt": "question", "response": "answer"},
    "generic": {"text": "text"},
}
_COLUMN_CHOICES = ({"text"}, {"messages"}, {"prompt", "response"})
_ROWS_PER_GROUP = 256


class DataConfig(StrictModel):
    """What is read: a data set, or weighted sources of a data directory."""

    domain: Domain
    dataset_name: str | None = Field(
        default=None, description="a Hugging Face data set by name, or a local file or folder of JSONL, Parquet, CSV or text"
    )
    dataset_config: str | None = Field(default=None, description="which of the data set's configurations")
    dataset_split: str = "train"
    streaming: bool = Field(default=False, description="read no more of a data set on the Hub than is needed")
    columns: dict[str, str] | None = Field(
        default=None,
        description="the data set's columns: {text: content}, or {messages: messages} of role and content, or "
        "{prompt: question, response: answer}; as is usual in the domain if unset",
    )
    max_documents: int | None = Field(default=None, gt=0, description="read so many at the most")
    learn_all: bool = Field(default=False, description="learn every turn of a conversation, and not only the assistant's")
    fim_rate: float = Field(default=0.0, ge=0, le=1, description="how many texts, of 1, become tasks to fill in the middle")
    data_dir: str = Field(default="data/train", description="where the sources are")
    sources: dict[str, float] = Field(default_factory=dict, description="weights by source, read from data_dir")

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if (self.dataset_name is None) == (not self.sources):
            raise ValueError("expected either dataset_name or sources")
        if self.columns is not None and set(self.columns) not in _COLUMN_CHOICES:
            raise ValueError("columns: expected the keys text, or messages, or prompt and response")
        if self.sources and not all(weight > 0 for weight in self.sources.values()):
            raise ValueError(f"sources: expected weights above 0, got {self.sources}")
        return self

    @property
    def column_names(self) -> dict[str, str]:
        """What the columns of the data set are called, by what is in them."""
        return self.columns or _COLUMNS[self.domain]

    @property
    def weights(self) -> dict[str, float]:
        """How often each source is read; a data set is a single source."""
        return {self.dataset_name: 1.0} if self.dataset_name is not None else self.sources


@dataclass
class Reading:
    """Tokenized documents.

    Attributes:
        training, held_out: examples by source.
        unusable: how many documents were left out, by cause.
        num_tokens: of all examples.
    """

    training: dict[str, list[Example]]
    held_out: dict[str, list[Example]]
    unusable: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0

    @staticmethod
    def of(config: DataConfig) -> "Reading":
        """One that has read nothing yet."""
        return Reading({source: [] for source in config.weights}, {source: [] for source in config.weights})

    def add(self, row: dict[str, Any]) -> None:
        """Takes what `tokenize` made of a document."""
        if row["problem"]:
            self.unusable[row["problem"]] += 1
            return
        split = self.held_out if row["is_held_out"] else self.training
        split[row["source"]].append(Example(row["ids"], row["is_scored"]))
        self.num_tokens += len(row["ids"])

    def check(self, *, needs_all: bool = True) -> None:
        """Raises a `ConfigError` unless there is something to learn from and to hold out, of each source or at least of one."""
        lacking = [source for source, found in self.training.items() if not found or not self.held_out[source]]
        if lacking and (needs_all or len(lacking) == len(self.training)):
            raise ConfigError(f"data: expected documents of {lacking[0]} to learn from and to hold out, got {self.summary()}")

    def summary(self) -> str:
        """One line for people."""
        used = sum(map(len, self.training.values())), sum(map(len, self.held_out.values()))
        causes = "".join(f", {count} {cause}" for cause, count in sorted(self.unusable.items()))
        return f"{used[0]} documents to learn from, {used[1]} held out, {self.unusable.total()} left out{causes}"


def parse(row: dict[str, Any], config: DataConfig) -> Document:
    """Makes a document of a row: of a data set's own columns, or of `source` and `document`, as JSON, of a data directory.

    Raises:
        UnusableError: there is none in it.
    """
    if config.dataset_name is not None:
        return _document(row, config.column_names)
    values = json.loads(row["document"])
    return Document(values["text"], tuple(Message(**message) for message in values["messages"]))


def source_of(row: dict[str, Any], config: DataConfig) -> str:
    """Which of the configuration's sources a row is of."""
    return config.dataset_name if config.dataset_name is not None else str(row["source"])


def tokenize(batch: dict[str, np.ndarray], config: dict[str, Any], tokenizer: str) -> dict[str, list[Any]]:
    """Columns of rows in; for each row what `Reading.add` takes out: its ids, or what makes it unusable."""
    settings = DataConfig.model_validate(config)
    formatter = _formatter(tokenizer, settings.fim_rate, settings.learn_all)
    found = [
        _tokenized_row(dict(zip(batch, values, strict=True)), settings, formatter)
        for values in zip(*batch.values(), strict=True)
    ]
    return {name: [row[name] for row in found] for name in found[0]}


def _tokenized_row(row: dict[str, Any], config: DataConfig, formatter: Formatter) -> dict[str, Any]:
    found = {"source": source_of(row, config), "is_held_out": False, "problem": ""}
    example: Example | None = None
    try:
        document = parse(row, config)
        found["is_held_out"] = is_held_out(document)
        example = formatter.example(document)
        found["problem"] = "" if example else "with nothing to learn"
    except UnusableError as error:
        found["problem"] = str(error)
    example = example or Example.of([0], [False])
    return found | {"ids": example.ids, "is_scored": example.is_scored}


@lru_cache(maxsize=4)
def _formatter(tokenizer: str, fim_rate: float, learn_all: bool) -> Formatter:
    return Formatter(load_tokenizer(tokenizer), fim_rate, learn_all=learn_all)


class UnusableError(Exception):
    """A row that cannot be used, and why."""


def _document(row: dict[str, Any], columns: dict[str, str]) -> Document:
    """Makes a document of a row of a data set."""
    if "text" in columns:
        return Document(text=_text(row[columns["text"]]))
    if "messages" in columns:
        turns = row[columns["messages"]]
        if turns is None or not len(turns) or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns):
            raise UnusableError("without turns of role and content")
        return Document(messages=tuple(Message(_text(turn["role"]), _text(turn["content"])) for turn in turns))
    exchange = (Message("user", _text(row[columns["prompt"]])), Message("assistant", _text(row[columns["response"]])))
    return Document(messages=exchange)


def _text(value: Any) -> str:
    if isinstance(value, (int, np.integer)):  # as an answer in a CSV file is
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UnusableError("without text")
    return value


def training_blocks(
    examples: dict[str, list[Example]], weights: dict[str, float], length: int, pad_id: int, seed: int
) -> Iterator[Block]:
    """Blocks without end, each of one source, which is drawn with its weight; the examples are read again and again."""
    streams = {
        source: pack(cycle(found, np.random.default_rng([seed, number])), length, pad_id)
        for number, (source, found) in enumerate(examples.items(), start=1)
    }
    return interleave(streams, weights, np.random.default_rng([seed, 0]))


def validation_blocks(
    examples: dict[str, list[Example]], num_blocks: int, length: int, pad_id: int, seed: int
) -> dict[str, list[Block]]:
    """At the most `num_blocks` for each source; no document is read twice."""
    rng = np.random.default_rng([seed, 0])
    return {
        source: list(islice(pack([found[i] for i in rng.permutation(len(found))], length, pad_id), num_blocks))
        for source, found in examples.items()
    }


def write_blocks(path: Path, groups: Iterable[tuple[str, Iterable[Block]]]) -> int:
    """Writes blocks as Parquet, with the name of each one's group; returns how many there are."""
    schema = pa.schema(
        [(name, pa.list_(pa.int32())) for name in ("input_ids", "position_ids", "labels")] + [("group", pa.string())]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    num_blocks = 0
    with pq.ParquetWriter(new, schema) as writer:
        for group, blocks in groups:
            rest = iter(blocks)
            while rows := list(islice(rest, _ROWS_PER_GROUP)):
                table = {name: [getattr(row, name) for row in rows] for name in schema.names[:3]}
                writer.write_table(pa.table({**table, "group": [group] * len(rows)}, schema))
                num_blocks += len(rows)
    new.replace(path)
    return num_blocks


def read_blocks(path: Path) -> Dataset:
    """What `write_blocks` wrote, from disk as it is needed."""
    return Dataset.from_parquet(str(path), cache_dir=str(path.parent / ".cache"), keep_in_memory=False)
