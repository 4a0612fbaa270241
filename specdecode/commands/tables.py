"""Figures in, tables on the terminal or JSON for programs out."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from rich.table import Table

    from specdecode.evaluation.figures import Figure


def make_table(headings: tuple[str, ...], title: str | None = None, num_left: int = 1) -> "Table":
    """A table of which the first columns are text, and the others numbers."""
    from rich.table import Table

    table = Table(title=title, box=None)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < num_left else "right", no_wrap=True)
    return table


def as_markdown(table: "Table") -> str:
    """A table as Markdown has it."""
    headings = [str(column.header) for column in table.columns]
    lines = ["---:" if column.justify == "right" else "---" for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (headings, lines, *rows))


def print_tables(*tables: "Table") -> None:
    from rich.console import Console

    console = Console(width=160 if not sys.stdout.isatty() else None)
    for table in tables:
        console.print(table)


def print_json(found: Any) -> None:
    """Prints figures as JSON: dataclasses and pydantic models by their fields, alone or in lists and mappings."""
    print(json.dumps(_plain(found), indent=1))


def figure(value: "Figure | None", form: str) -> str:
    return "" if value is None else format(value.value, form)


def interval(value: "Figure | None", form: str = ".2f") -> str:
    return "" if value is None else value.told(form)


def _plain(found: Any) -> Any:
    if is_dataclass(found) and not isinstance(found, type):
        return asdict(found)
    if isinstance(found, BaseModel):
        return found.model_dump(mode="json")
    if isinstance(found, dict):
        return {name: _plain(value) for name, value in found.items()}
    if isinstance(found, Iterable) and not isinstance(found, str):
        return [_plain(value) for value in found]
    return found
