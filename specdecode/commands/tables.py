"""Figures in, tables on the terminal out."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from specdecode.evaluation.analysis import Figure


def make_table(headings: tuple[str, ...], title: str | None = None, num_left: int = 1) -> "Table":
    """A table of which the first columns are text, and the others numbers."""
    from rich.table import Table

    table = Table(title=title, box=None)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < num_left else "right", no_wrap=True)
    return table


def print_tables(*tables: "Table") -> None:
    from rich.console import Console

    console = Console(width=160 if not sys.stdout.isatty() else None)
    for table in tables:
        console.print(table)


def figure(value: "Figure | None", form: str) -> str:
    return "" if value is None else format(value.value, form)


def interval(value: "Figure | None", form: str = ".2f") -> str:
    return "" if value is None else f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"
