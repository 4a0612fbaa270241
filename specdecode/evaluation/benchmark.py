"""A configuration in, a folder of records out, measured in this process; stopped, it goes on where it was.

- `OUTPUT_DIR/records/part-00000.parquet` ...: see `records.Record`.
- `OUTPUT_DIR/run.json`: how it came about, configuration, versions, machine.
- `OUTPUT_DIR/summary.json`: what `write_summary` makes of the records, and of nothing else.
"""

import json
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdecode.config import check_config
from specdecode.errors import ConfigError
from specdecode.evaluation.analysis import Summary, summary
from specdecode.evaluation.machine import machine, versions
from specdecode.evaluation.records import Record, read_records
from specdecode.evaluation.suite import BenchmarkConfig, as_rows, load_items
from specdecode.parts import Parts, part_path

RUN, RECORDS, SUMMARY = "run.json", "records", "summary.json"
# What may be another the next time that a benchmark goes on: it does not change what is measured.
_MAY_CHANGE = {"num_actors", "num_cpus", "num_gpus", "output_dir"}

Measure = Callable[[BenchmarkConfig, Path, list[dict[str, Any]]], Iterable[dict[str, Any]]]
"""Configuration, folder and parts in; what each part came to out, as it is done."""


def measure_here(config: BenchmarkConfig, folder: Path, rows: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Measures parts one after the other in this process."""
    from specdecode.evaluation.runner import Runner  # transformers takes seconds to import

    runner = Runner(config.model_dump(), str(folder))
    return map(runner, rows)


def run_benchmark(
    config: BenchmarkConfig, measure: Measure = measure_here, tell: Callable[[int, int], None] | None = None
) -> list[Record]:
    """Measures what is not there yet, and reads all of it.

    Args:
        config: everything.
        measure: where parts are measured.
        tell: hears how many parts are there, and of how many.

    Raises:
        ConfigError: a data set is not there, or the folder holds the records of another configuration.
        ModelError: a model does not load.
    """
    output = Path(config.output_dir)
    items = load_items(config)
    rows = as_rows(items, config.part)
    parts = Parts(output / RECORDS, config.model_dump(mode="json", exclude=_MAY_CHANGE))
    if not (output / RUN).exists():
        (output / RUN).write_text(json.dumps(provenance(config, len(items)), indent=2) + "\n", encoding="utf-8")
    missing = parts.missing(len(rows))
    if tell is not None:
        tell(len(rows) - len(missing), len(rows))
    if missing:
        done = measure(config, (output / RECORDS).absolute(), [rows[number] for number in missing])
        for count, _ in enumerate(done, start=len(rows) - len(missing) + 1):
            if tell is not None:
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


def write_summary(folder: str | Path) -> Summary:
    """Writes summary.json of a finished run's records, and of nothing else.

    Raises:
        ConfigError: the folder holds none, or one that is not finished.
    """
    _, _, records = read_run(folder)
    found = summary(records)
    (Path(folder) / SUMMARY).write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    return found


def provenance(config: BenchmarkConfig, num_questions: int) -> dict[str, Any]:
    """How a run comes about: all that is needed to say whether another one should give the same."""
    return {
        "config": config.model_dump(mode="json"),
        "num_parts": -(-num_questions // config.part),
        "num_questions": num_questions,
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
