"""What each arm did on each prompt, as rows of a file: collected, or of served traffic; a router learns from them."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from specdecode.errors import ConfigError
from specdecode.rows import schema_of, write_rows

NONE = "none"  # the arm of plain decoding
ADAPTIVE = "adaptive"  # that of a router, which chooses among the others


@dataclass(frozen=True)
class Record:
    """How one arm does on one prompt.

    Attributes:
        prompt_id: names the prompt: records of one prompt are compared with each other.
        domain: what kind of prompt it is said to be; nothing is decided by it.
        prompt: its text, or the last user's message.
        is_chat: whether it is a message.
        num_prompt_tokens: of the whole prompt.
        arm: a draft's name, `none`, or `adaptive`.
        acceptance: the chance that a drafted token is accepted; 0 of `none`.
        num_verdicts: how many tokens that was counted on.
        accepted_lengths: tokens of a round with 1, 2, ... drafted ones, the target's own included.
        k: how many are drafted.
        tokens_per_second: at that many.
        mode: `decoded`, `scored` in one pass over the target's own answer, or `served` to somebody.
        error: what went wrong; the figures are then 0.
    """

    prompt_id: str
    domain: str
    prompt: str
    is_chat: bool
    num_prompt_tokens: int
    arm: str
    acceptance: float = 0.0
    num_verdicts: int = 0
    accepted_lengths: list[float] = field(default_factory=list)
    k: int = 0
    tokens_per_second: float = 0.0
    mode: str = "decoded"
    error: str | None = None


_COLUMNS = schema_of(Record).names


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Writes a Parquet file, or a JSON array if the path ends so; whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".json":
        return write_rows(path, records, Record)
    new = path.with_name(f".{path.name}.new")
    told = json.dumps([asdict(record) for record in records], ensure_ascii=False, indent=1)
    new.write_text(f"{told}\n", encoding="utf-8")
    new.replace(path)
    return None


def read_records(path: str | Path) -> list[Record]:
    """Reads what `write_records` wrote, or a server as JSON lines: a file, or all such files of a folder.

    Raises:
        ConfigError: there are none, or a row is not one.
    """
    path = Path(path)
    files = sorted([*path.glob("*.parquet"), *path.glob("*.jsonl")]) if path.is_dir() else [path]
    try:
        rows = [row for file in files for row in _rows(file)]
    except (OSError, ValueError) as error:  # pyarrow's and json's own are such
        raise ConfigError(f"{path}: cannot be read as records: {str(error).splitlines()[0]}") from error
    if not rows:
        raise ConfigError(f"{path}: expected records, found none")
    return [_record(row, f"{path}, row {number}") for number, row in enumerate(rows)]


def _rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".json":
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        return rows
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    table: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return table


def _record(row: Any, where: str) -> Record:
    try:
        record = Record(**row)
    except TypeError as error:
        raise ConfigError(f"{where}: expected a record with {', '.join(_COLUMNS)}: {error}") from error
    figures = (record.acceptance, record.tokens_per_second, *record.accepted_lengths)
    if record.error is None and not all(isinstance(value, (int, float)) and math.isfinite(value) for value in figures):
        raise ConfigError(f"{where}: expected finite figures, got {record.acceptance}, {record.tokens_per_second}")
    if not 0 <= record.acceptance <= 1:
        raise ConfigError(f"{where}: acceptance: expected a number in [0, 1], got {record.acceptance}")
    return record
