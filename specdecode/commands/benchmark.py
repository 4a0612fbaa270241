"""`specdecode benchmark`, `report` and `compare`: a grid of ways to decode in, tables and reports out."""

import argparse
import logging
import sys
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from specdecode.commands.load import print_load
from specdecode.commands.options import Commands, add_command, add_config, add_json, add_log_format
from specdecode.commands.tables import as_markdown, figure, interval, make_table, print_json, print_tables
from specdecode.config import load_config
from specdecode.errors import ConfigError
from specdecode.log import LogFormat, logging_to_stderr

if TYPE_CHECKING:
    from rich.table import Table

    from specdecode.evaluation.analysis import Summary
    from specdecode.evaluation.records import Record
    from specdecode.evaluation.suite import BenchmarkConfig, Cell

_CELL = ("experiment", "draft", "K", "T", "verifier", "batch", "domain")


def add_benchmark(commands: Commands) -> None:
    benchmark = add_command(
        commands,
        "benchmark",
        _benchmark,
        "compare ways to decode, question by question in turns",
        "specdecode benchmark --config configs/tiny/benchmark.yaml --experiments baseline --set output_dir=results/some",
    )
    add_config(benchmark, "K=3 or num_repeats=2", file="configs/tiny/benchmark.yaml")
    benchmark.add_argument("--experiments", metavar="NAME,...", help="such as baseline,generic_draft, instead of the file's")
    benchmark.add_argument(
        "--no-report", action="store_true", help="no charts and no report.html, for which matplotlib is needed"
    )
    add_json(benchmark)
    add_log_format(benchmark)


def add_report(commands: Commands) -> None:
    report = add_command(
        commands,
        "report",
        _report,
        "make the tables, and a benchmark's charts and report.html, again from the records alone",
        "specdecode report results/tiny",
    )
    report.add_argument("folder", help="the output_dir of a benchmark or a load")
    report.add_argument("--no-report", action="store_true", help="only the tables: no charts and no report.html")
    form = report.add_mutually_exclusive_group()
    add_json(form)
    form.add_argument("--markdown", action="store_true", help="print Markdown instead, with how a benchmark came about")


def add_compare(commands: Commands) -> None:
    compare = add_command(
        commands,
        "compare",
        _compare,
        "say what is faster or slower in a second benchmark than in a first",
        "specdecode compare results/before results/after",
    )
    compare.add_argument("before", help="the output_dir of a benchmark")
    compare.add_argument("after", help="that of another one")
    add_json(compare)


def _benchmark(parsed: argparse.Namespace) -> None:
    from specdecode.evaluation.benchmark import conclude
    from specdecode.evaluation.suite import BenchmarkConfig

    chosen = [f"experiments=[{parsed.experiments}]"] if parsed.experiments else []
    silent = ["report=false"] if parsed.no_report else []
    config = load_config(parsed.config, BenchmarkConfig, [*parsed.set, *chosen, *silent])
    measure(config, parsed.log_format, parsed.command)
    _print_summary(config.output_dir, conclude(config.output_dir, config.report, config.logging), parsed.json, config.report)


def measure(config: "BenchmarkConfig", log_format: LogFormat | None, command: str) -> "list[Record]":
    """Runs what is not there yet; with a bar on a terminal, unless log lines are asked for."""
    from rich.console import Console
    from rich.progress import Progress

    from specdecode.evaluation.benchmark import run_benchmark

    format = log_format or config.logging.format
    is_told = log_format is not None or format == "json"
    lines = logging_to_stderr(format, logging.INFO if is_told else logging.WARNING, command=command)
    has_bar = sys.stderr.isatty() and not is_told
    with lines, Progress(console=Console(stderr=True), transient=True, disable=not has_bar) as progress:
        task = progress.add_task("parts", total=None)
        return run_benchmark(config, tell=lambda done, count: progress.update(task, completed=done, total=count))


def _report(parsed: argparse.Namespace) -> None:
    from specdecode.evaluation.benchmark import conclude, read_run
    from specdecode.evaluation.load import is_load

    if is_load(parsed.folder):
        print_load(parsed.folder, parsed.json)
        return
    has_report = not parsed.no_report
    summary = conclude(parsed.folder, has_report)
    if parsed.markdown:
        print("\n\n".join([*_about(read_run(parsed.folder)[1]), as_markdown(_summary_table(summary))]))
        return
    _print_summary(parsed.folder, summary, parsed.json, has_report)


def _print_summary(folder: str, summary: "Summary", as_json: bool, has_report: bool) -> None:
    from specdecode.evaluation.benchmark import REPORT
    from specdecode.evaluation.cells import setting_of

    if as_json:
        print_json(summary)
        return
    print_tables(_summary_table(summary))
    if summary.routing is not None:
        found = summary.routing
        print(f"the router's regret to the fastest draft of each question: {interval(found.regret, '.1%')}")
        print(f"it is {interval(found.to_best_single)} as fast as {found.best_single}, the best single one")
    for curve in summary.lengths:
        print(f"of drafts of any length, K={curve.cell.K} is predicted to be fastest ({setting_of(curve.cell)})")
    print(f"records and summary.json are in {folder}")
    if has_report:
        print(f"the report is {folder}/{REPORT}")


def _about(run: dict[str, Any]) -> list[str]:
    """How a run came about, in paragraphs."""
    config, machine = run["config"], run["machine"]
    where = ", ".join([machine["processor"], f"{machine['num_cores']} cores", *machine["gpus"]])
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    names = ", ".join(dataset["name"] for dataset in config["datasets"])
    lengths = f"at the most {config['max_new_tokens']} tokens for each answer"
    return [
        f"Target `{config['target']['model']}` on {run['num_questions']} questions of {names}, {lengths}.",
        f"Measured on {where}; {versions}; revision {run['revision']}.",
    ]


def _summary_table(summary: "Summary") -> "Table":
    right = ("answers", "tok/s", "speed-up", "acceptance", "tokens/pass", "ttft ms", "right", "different")
    table = make_table(_CELL + right, num_left=len(_CELL))
    for row in summary.rows:
        table.add_row(
            *_cell(row.cell),
            row.domain,
            f"{row.num_answers}" + (f" ({row.num_errors} failed)" if row.num_errors else ""),
            figure(row.tokens_per_second, ".1f"),
            interval(row.speed_up),
            figure(row.acceptance, ".3f"),
            figure(row.tokens_per_pass, ".2f"),
            f"{row.ttft_ms[0]:.1f}" if row.ttft_ms else "",
            figure(row.right, ".1%"),
            "" if row.num_different is None else str(row.num_different),
        )
    return table


def _compare(parsed: argparse.Namespace) -> None:
    from specdecode.evaluation.benchmark import read_run
    from specdecode.evaluation.changes import compare_runs

    changes = compare_runs(read_run(parsed.before)[2], read_run(parsed.after)[2])
    if not changes:
        raise ConfigError(f"{parsed.before} and {parsed.after}: expected an experiment that both have, found none")
    if parsed.json:
        print_json(changes)
        return
    table = make_table(
        (*_CELL, "speed", "verdict", "to its baseline", "different"), f"{parsed.after} to {parsed.before}", num_left=len(_CELL)
    )
    for change in changes:
        different = "" if change.num_different is None else str(change.num_different)
        table.add_row(
            *_cell(change.cell),
            change.domain,
            interval(change.speed_up),
            change.verdict,
            interval(change.to_baseline),
            different,
        )
    print_tables(table)


def _cell(cell: "Cell") -> list[str]:
    """A cell's parts, under all headings of `_CELL` but the last."""
    return [f"{value:g}" if isinstance(value, float) else str(value) for value in astuple(cell)]
