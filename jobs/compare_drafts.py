"""Compares drafts of one target by domain: `python -m jobs.compare_drafts --config configs/tiny/compare_drafts.yaml`."""

import sys
from collections.abc import Iterable

from rich.table import Table

from jobs.command import as_text, run_job
from specdecode.training.comparison import COLUMNS, Comparison, ComparisonConfig, cells, compare


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("compare_drafts", "Compare drafts of one target.", ComparisonConfig, _run, arguments)


def _run(config: ComparisonConfig) -> str:
    return as_table(config, compare(config))


def as_table(config: ComparisonConfig, rows: Iterable[Comparison]) -> str:
    """A row for each draft and domain, for a terminal."""
    table = Table(title=f"{config.target}, K {config.K}: of a round's tokens the target's own is one")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in rows:
        table.add_row(*cells(row))
    return as_text(table)


if __name__ == "__main__":
    sys.exit(main())
