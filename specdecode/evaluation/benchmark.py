"""A configuration in, a folder of records out, measured in this process; stopped, it goes on where it was.

- `OUTPUT_DIR/records/part-00000.parquet` ...: see `records.Record`.
- `OUTPUT_DIR/run.json`: how it came about, configuration, versions, machine.
- `OUTPUT_DIR/summary.json`: what `conclude` makes of the records, and of nothing else.
- `OUTPUT_DIR/report.html` and `OUTPUT_DIR/charts`: the same for people; see `report.write_report`.
"""

import importlib.util
import json
import logging
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from specdecode.config import check_config
from specdecode.errors import ConfigError
from specdecode.evaluation.analysis import Summary, summary
from specdecode.evaluation.machine import machine, versions
from specdecode.evaluation.records import Record, read_records
from specdecode.evaluation.suite import BenchmarkConfig, as_rows, cells, load_items
from specdecode.parts import Parts, part_path
from specdecode.training.reporting import WandbConfig

logger = logging.getLogger(__name__)

RUN, RECORDS, SUMMARY, REPORT = "run.json", "records", "summary.json", "report.html"
# What may be another the next time that a benchmark goes on: it does not change what is measured.
_MAY_CHANGE = {"num_actors", "num_cpus", "num_gpus", "output_dir", "report", "logging"}

Measure = Callable[[BenchmarkConfig, Path, list[dict[str, Any]]], Iterable[dict[str, Any]]]
"""Configuration, folder and parts in; what each part came to out, as it is done."""


def measure_here(config: BenchmarkConfig, folder: Path, rows: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Measures parts one after the other in this process."""
    from specdecode.evaluation.runner import Runner  # transformers takes seconds to import

    runner = Runner(config.model_dump(), str(folder))
    return map(runner, rows)


def run_benchmark(
    config: BenchmarkConfig, measure: Measure = measure_here, tell: Callable[[int, int], None] = lambda _done, _count: None
) -> list[Record]:
    """Measures what is not there yet, and reads all of it.

    Args:
        config: everything.
        measure: where parts are measured.
        tell: hears how many parts are there, and of how many.

    Raises:
        ConfigError: a data set is not there, the folder holds the records of another configuration, or something is not
            installed that `conclude` will need.
        ModelError: a model does not load.
    """
    config.logging.check()
    if config.report:
        check_can_draw()
    output = Path(config.output_dir)
    items = load_items(config)
    rows = as_rows(items, config.part)
    parts = Parts(output / RECORDS, config.model_dump(mode="json", exclude=_MAY_CHANGE))
    if not (output / RUN).exists():
        (output / RUN).write_text(json.dumps(provenance(config, len(items)), indent=2) + "\n", encoding="utf-8")
    missing = parts.missing(len(rows))
    begun = {"run": config.output_dir, "num_cells": len(cells(config)), "num_questions": len(items), "num_parts": len(rows)}
    logger.info("%(num_cells)d ways to decode %(num_questions)d questions, for %(run)s", begun, extra=begun)
    tell(len(rows) - len(missing), len(rows))
    if missing:
        measured = measure(config, (output / RECORDS).absolute(), [rows[number] for number in missing])
        for count, part in enumerate(measured, start=len(rows) - len(missing) + 1):
            fields = {"run": config.output_dir, "part": part["number"], "num_done": count, "num_parts": len(rows)}
            fields |= {"num_records": part["num_records"], "num_errors": part["num_errors"]}
            logger.info("%d of %d parts are there", count, len(rows), extra=fields)
            tell(count, len(rows))
    return read_records(parts.paths(len(rows)))


def read_run(folder: str | Path) -> tuple[BenchmarkConfig, dict[str, Any], list[Record]]:
    """A finished run's configuration, how it came about, and its records.

    Raises:
        ConfigError: the folder holds none, or one that is not finished.
    """
    path = Path(folder) / RUN
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: expected the results of a benchmark, but {RUN} cannot be read: {error}") from error
    config = check_config(run["config"], BenchmarkConfig, where=str(path))
    count = run["num_parts"]
    missing = [number for number in range(count) if not part_path(Path(folder) / RECORDS, number).exists()]
    if missing:
        raise ConfigError(
            f"{folder}: expected a finished benchmark, but {len(missing)} of {count} parts are missing: run it again"
        )
    return config, run, read_records([part_path(Path(folder) / RECORDS, number) for number in range(count)])


def check_can_draw() -> None:
    """Raises a `ConfigError` if a report is asked for and matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "report: expected matplotlib to be installed (pip install 'specdecode[bench]'), or report: false (--no-report)"
        )


def conclude(folder: str | Path, report: bool = True, log: WandbConfig | None = None) -> Summary:
    """Writes summary.json, and the report if it is asked for, of a finished run's records, and of nothing else.

    Args:
        folder: the run's output_dir.
        report: whether charts are drawn and report.html is written.
        log: whether, and where to, the results are logged.

    Raises:
        ConfigError: the folder holds none, or one that is not finished; or matplotlib is not installed.
    """
    _, run, records = read_run(folder)
    found = summary(records)
    (Path(folder) / SUMMARY).write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    pictures: list[Path] = []
    if report:
        check_can_draw()
        from specdecode.evaluation.report import write_report  # matplotlib is an extra

        pictures = write_report(folder, run, records, found)
    if log is not None and log.use_wandb:
        from specdecode.evaluation.tracking import track

        track(log, run, found, pictures)
    return found


def provenance(config: BenchmarkConfig, num_questions: int) -> dict[str, Any]:
    """How a run comes about: all that is needed to say whether another one should give the same."""
    return {
        "config": config.model_dump(mode="json"),
        "num_parts": -(-num_questions // config.part),
        "num_questions": num_questions,
        "started": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "revision": _revision(),
        "versions": versions(),
        "machine": machine(),
    }


def _revision() -> str | None:
    """Of the code, where it is a git checkout."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
