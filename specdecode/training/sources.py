"""A data configuration in, training and validation documents by source out."""

from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from pydantic import Field, model_validator

from specdecode.config import StrictModel
from specdecode.errors import ConfigError
from specdecode.training.documents import Document, Message, is_held_out, load_documents

Domain = Literal["code", "chat", "reasoning", "generic"]
_COLUMN_CHOICES = ({"text"}, {"messages"}, {"prompt", "response"})


class DraftDataConfig(StrictModel):
    """What a draft reads: either a Hugging Face data set, or the weighted sources of a data directory.

    `columns` says what the data set's columns are: `{text: content}` for raw text, `{messages: messages}` for
    conversations of role and content, or `{prompt: question, response: answer}` for single exchanges.
    """

    domain: Domain
    dataset_name: str | None = Field(default=None, description="a Hugging Face data set by name, or a local path")
    dataset_config: str | None = None
    dataset_split: str = "train"
    columns: dict[str, str] = Field(default_factory=lambda: {"text": "content"})
    max_documents: int | None = Field(default=None, gt=0)
    data_dir: str = "data/train"
    sources: dict[str, float] = Field(default_factory=dict, description="weights by source, read from data_dir")

    @model_validator(mode="after")
    def _has_one_origin(self) -> "DraftDataConfig":
        if (self.dataset_name is None) == (not self.sources):
            raise ValueError("expected either dataset_name or sources")
        if set(self.columns) not in _COLUMN_CHOICES:
            raise ValueError("columns: expected the keys text, or messages, or prompt and response")
        return self


def load_split(config: DraftDataConfig) -> tuple[dict[str, list[Document]], dict[str, list[Document]]]:
    """The training documents and the held-out ones, by source.

    Raises:
        ConfigError: the data are not there or have other columns, or nothing is left for one of the splits.
    """
    if config.dataset_name is None:
        documents = {source: load_documents(source, config.data_dir) for source in config.sources}
    else:
        documents = {config.dataset_name: _load_data_set(config.dataset_name, config)}
    training = {source: [d for d in found if not is_held_out(d)] for source, found in documents.items()}
    held_out = {source: [d for d in found if is_held_out(d)] for source, found in documents.items()}
    for source, found in documents.items():
        if not training[source] or not held_out[source]:
            raise ConfigError(f"data source {source}: {len(found)} documents are too few to hold some out")
    return training, held_out


def source_weights(config: DraftDataConfig) -> dict[str, float]:
    """How often each source is read; a data set is a single source."""
    return {config.dataset_name: 1.0} if config.dataset_name is not None else config.sources


def _load_data_set(name: str, config: DraftDataConfig) -> list[Document]:
    rows = _open_data_set(name, config)
    missing = set(config.columns.values()) - set(rows.column_names)
    if missing:
        raise ConfigError(
            f"data.columns: data set {name} has no column {', '.join(sorted(missing))}; it has {rows.column_names}"
        )
    if config.max_documents is not None:
        rows = rows.select(range(min(config.max_documents, len(rows))))
    return [_document(row, config.columns) for row in rows]


def _open_data_set(name: str, config: DraftDataConfig) -> Dataset:
    path = Path(name)
    try:
        if path.is_file():
            formats = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
            return load_dataset(formats.get(path.suffix, "json"), data_files=str(path), split="train")
        if path.is_dir() and any((path / marker).exists() for marker in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(str(path))
            return saved[config.dataset_split] if isinstance(saved, DatasetDict) else saved
        return load_dataset(name, config.dataset_config, split=config.dataset_split)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ConfigError(f"data.dataset_name: data set {name} does not load: {reason}") from error


def _document(row: dict[str, Any], columns: dict[str, str]) -> Document:
    if "text" in columns:
        return Document(text=row[columns["text"]])
    if "messages" in columns:
        return Document(messages=tuple(Message(m["role"], m["content"]) for m in row[columns["messages"]]))
    exchange = (Message("user", row[columns["prompt"]]), Message("assistant", row[columns["response"]]))
    return Document(messages=exchange)
