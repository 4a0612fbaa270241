"""Objects of a dataclass in, a Parquet file of their fields out, and back; whole, or not at all."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

_Kind = TypeVar("_Kind")
_TYPES = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}


def schema_of(kind: type) -> pa.Schema:
    """The columns for a dataclass of texts, numbers, lists of them, and what may be None."""
    return pa.schema([(name, _column(hint)) for name, hint in get_type_hints(kind).items()])


def _column(hint: Any) -> pa.DataType:
    if hint in _TYPES:
        return _TYPES[hint]
    [inner] = [part for part in get_args(hint) if part is not type(None)]
    return pa.list_(_TYPES[inner]) if getattr(hint, "__origin__", None) is list else _column(inner)


def write_rows(path: Path, rows: Iterable[Any], kind: type) -> None:
    """Writes objects of `kind` in place of what the file held."""
    new = path.with_name(f".{path.name}.new")
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema_of(kind)), new)
    new.replace(path)


def read_rows(path: Path, kind: type[_Kind]) -> list[_Kind]:
    """Reads what `write_rows` wrote.

    Raises:
        OSError, ValueError: the file is not there, or none of `kind`.
    """
    table = pq.read_table(path)
    if table.schema.names != schema_of(kind).names:
        raise ValueError(f"expected the columns {', '.join(schema_of(kind).names)}, got {', '.join(table.schema.names)}")
    return [kind(**row) for row in table.to_pylist()]
