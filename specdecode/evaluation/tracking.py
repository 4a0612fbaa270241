"""A finished benchmark in, a run of Weights & Biases out. Measures nothing."""

from collections.abc import Sequence as Several
from dataclasses import astuple
from pathlib import Path
from typing import Any

from specdecode.evaluation.analysis import Row, Summary
from specdecode.evaluation.figures import Figure
from specdecode.training.reporting import WandbConfig

_CELL = ("experiment", "draft", "K", "temperature", "verifier", "batch")
_FIGURES = (
    "tokens_per_second",
    "speed_up",
    "acceptance",
    "tokens_per_pass",
    "right",
    "perplexity",
    "num_different",
    "num_errors",
)


def track(log: WandbConfig, run: dict[str, Any], summary: Summary, pictures: Several[Path]) -> None:
    """Logs each figure by the cell and domain that it is of, all of them as a table, and the charts.

    Args:
        log: where to.
        run: how the results came about, which becomes the run's configuration.
        summary: the figures.
        pictures: the charts' files.
    """
    import wandb  # an extra, which is asked for

    with wandb.init(project=log.project, name=log.run_name, job_type="benchmark", config=run) as logged:
        logged.summary.update({name: value for row in summary.rows for name, value in _named(row).items()})
        columns = [*_CELL, "domain", *_FIGURES]
        table = wandb.Table(columns=columns, data=[_line(row) for row in summary.rows])
        logged.log({"results": table, **{f"charts/{path.stem}": wandb.Image(str(path)) for path in pictures}})


def _named(row: Row) -> dict[str, float]:
    cell = " ".join(map(str, astuple(row.cell)))
    return {f"{row.domain}/{cell}/{name}": value for name in _FIGURES if (value := _value(row, name)) is not None}


def _line(row: Row) -> list[Any]:
    return [*astuple(row.cell), row.domain, *(_value(row, name) for name in _FIGURES)]


def _value(row: Row, name: str) -> float | None:
    found = getattr(row, name)
    return found.value if isinstance(found, Figure) else found
