"""A data configuration in, documents and examples out: Ray Data reads the rows, and has them formatted and tokenized."""

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from ray.exceptions import RayTaskError

from specdecode.errors import ConfigError
from specdecode.training.checkpoints import load_tokenizer
from specdecode.training.data import DataConfig, Reading, UnusableError, parse, source_of, tokenize
from specdecode.training.documents import Document, load_documents
from specdecode.training.examples import Formatter

logger = logging.getLogger(__name__)

_READERS = {
    ".jsonl": "read_json",
    ".json": "read_json",
    ".parquet": "read_parquet",
    ".csv": "read_csv",
    ".txt": "read_text",
}
_BATCH = 64  # documents that one call tokenizes


def read(config: DataConfig, tokenizer: str, max_tokens: int | None = None, *, needs_all: bool = True) -> Reading:
    """Reads and tokenizes documents until they have `max_tokens`, or all of them.

    Args:
        config: what to read.
        tokenizer: the folder or name of the model whose tokenizer it is.
        max_tokens: of a data set; a data directory is read whole.
        needs_all: whether each source must have something to learn from; some have only questions.

    Raises:
        ConfigError: the data are not there or have other columns, or too little of them can be used.
    """
    if config.fim_rate:
        Formatter(load_tokenizer(tokenizer), config.fim_rate)  # says now what it cannot do
    reading = Reading.of(config)
    for row in _each(_rows(config).map_batches(tokenize, batch_size=_BATCH, fn_kwargs=_told(config, tokenizer))):
        reading.add(row)
        if config.dataset_name is not None and max_tokens is not None and reading.num_tokens >= max_tokens:
            break
    logger.info("%s", reading.summary())
    reading.check(needs_all=needs_all)
    return reading


def read_documents(config: DataConfig) -> dict[str, list[Document]]:
    """All documents that can be used, by source.

    Raises:
        ConfigError: the data are not there or have other columns.
    """
    found: dict[str, list[Document]] = {source: [] for source in config.weights}
    for row in _each(_rows(config)):
        with suppress(UnusableError):
            found[source_of(row, config)].append(parse(row, config))
    return found


def keep_order() -> None:
    """Has the data sets that are made from now on keep the order of their rows, and show no progress bars."""
    context = ray.data.DataContext.get_current()  # of which a data set keeps what it was when it was made
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False


def _told(config: DataConfig, tokenizer: str) -> dict[str, Any]:
    return {"config": config.model_dump(), "tokenizer": tokenizer}


def _each(rows: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """Every row, in the order of the data."""
    for batch in rows.iter_batches(batch_size=_BATCH, batch_format="numpy"):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _rows(config: DataConfig) -> ray.data.Dataset:
    """Rows as they come: of a data directory with the columns `source` and `document`, of a data set with its own."""
    keep_order()
    if config.dataset_name is None:
        found = {source: load_documents(source, config.data_dir) for source in config.sources}
        return ray.data.from_items(
            [{"source": source, "document": json.dumps(asdict(d))} for source, documents in found.items() for d in documents]
        )
    rows = _data_set(config.dataset_name, config)
    columns = _column_names(rows, config.dataset_name)
    if missing := set(config.column_names.values()) - set(columns or []):
        raise ConfigError(
            f"data.columns: data set {config.dataset_name} has no column {', '.join(sorted(missing))}; it has {columns}"
        )
    return rows if config.max_documents is None else rows.limit(config.max_documents)


def _column_names(rows: ray.data.Dataset, name: str) -> list[str] | None:
    try:
        names: list[str] | None = rows.columns()
    except (RayTaskError, pa.ArrowInvalid, ValueError) as error:
        raise _does_not_load(name, error.cause if isinstance(error, RayTaskError) else error) from error
    return names


def _does_not_load(name: str, error: BaseException) -> ConfigError:
    return ConfigError(f"data.dataset_name: data set {name} does not load: {str(error).strip().splitlines()[0]}")


def _data_set(name: str, config: DataConfig) -> ray.data.Dataset:
    path = Path(name)
    try:
        if path.is_dir() and any((path / marker).exists() for marker in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(str(path))
            return ray.data.from_huggingface(saved[config.dataset_split] if isinstance(saved, DatasetDict) else saved)
        if path.exists():
            return _local_files(path)
        found: Dataset | IterableDataset = load_dataset(
            name, config.dataset_config, split=config.dataset_split, streaming=config.streaming
        )
        return ray.data.from_huggingface(found)
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        raise _does_not_load(name, error) from error


def _local_files(path: Path) -> ray.data.Dataset:
    files = sorted(p for p in path.rglob("*") if p.suffix in _READERS) if path.is_dir() else [path]
    suffixes = {file.suffix for file in files}
    if len(suffixes) != 1 or not suffixes <= _READERS.keys():
        raise ValueError(f"expected files of one kind of {', '.join(_READERS)}, got {', '.join(sorted(suffixes)) or 'none'}")
    if not any(file.stat().st_size for file in files):
        raise ValueError("it is empty")
    rows: ray.data.Dataset = getattr(ray.data, _READERS[suffixes.pop()])([str(file.absolute()) for file in files])
    return rows
