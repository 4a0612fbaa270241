"""`specdecode load`: an OpenAI endpoint and a load in, throughput and latencies out."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from specdecode.commands.options import Commands, add_command, add_config, add_json
from specdecode.commands.tables import figure, interval, make_table, print_json, print_tables
from specdecode.config import load_config

if TYPE_CHECKING:
    from specdecode.evaluation.load_analysis import LoadRatio, LoadRow, Percentiles

_TITLES = {
    "concurrency": "closed loop: so many clients, each of which asks again when it has its answer",
    "rate": "open loop: so many requests a second, whose times count from their arrival",
}


def add_load(commands: Commands) -> None:
    load = add_command(
        commands,
        "load",
        _load,
        "test any OpenAI endpoint under load, or several against each other",
        "specdecode load --config configs/tiny/load.yaml --url http://127.0.0.1:8000/v1 --set rates=[]",
    )
    add_config(load, "concurrency=[1,8] or rates=[]", file="configs/tiny/load.yaml")
    load.add_argument("--url", help="the endpoint, such as http://127.0.0.1:8000/v1, instead of the file's")
    add_json(load)


def _load(parsed: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from specdecode.evaluation.load import run_load
    from specdecode.evaluation.load_plan import LoadConfig

    url = [f"url={json.dumps(parsed.url)}"] if parsed.url else []
    config = load_config(parsed.config, LoadConfig, [*parsed.set, *url])
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("loads", total=None)
        run_load(config, tell=lambda done, count: progress.update(task, completed=done, total=count))
    print_load(config.output_dir, parsed.json)


def print_load(folder: str, as_json: bool) -> None:
    """Summarises the results of a load, and prints that."""
    from specdecode.evaluation.load import write_load_summary

    summary = write_load_summary(folder)
    if as_json:
        print_json(summary)
        return
    for kind, title in _TITLES.items():
        if rows := [row for row in summary.rows if row.kind == kind]:
            _print_rows(kind, title, rows)
        if ratios := [ratio for ratio in summary.ratios if ratio.kind == kind]:
            _print_ratios(kind, ratios)
    for row in summary.rows:
        for error, count in row.errors.items():
            print(f"{row.arm} at {row.kind} {row.load:g}: {count} failed: {error}")
    print(f"records, summary.json and, with the extra bench, the chart load.png are in {folder}")


def _print_rows(kind: str, title: str, rows: "list[LoadRow]") -> None:
    times = ("ttft ms", "tpot ms", "itl ms", "latency ms")
    headings = (kind, "arm", "answers", "offered/s", "requests/s", "good/s", "tok/s", *times, "late ms")
    table = make_table(headings, f"{title}; times: p50 p90 p99", num_left=2)
    for row in rows:
        table.add_row(
            f"{row.load:g}",
            row.arm,
            f"{row.num_answers}" + (f" ({row.num_errors} failed)" if row.num_errors else ""),
            "" if row.offered_rate is None else f"{row.offered_rate:.2f}",
            figure(row.requests_per_second, ".2f"),
            figure(row.goodput, ".2f"),
            interval(row.tokens_per_second, ".1f"),
            *(_percentiles(found) for found in (row.ttft_ms, row.tpot_ms, row.itl_ms, row.latency_ms)),
            "" if row.late_ms is None or row.offered_rate is None else f"{row.late_ms:.0f}",
        )
    print_tables(table)


def _print_ratios(kind: str, ratios: "list[LoadRatio]") -> None:
    headings = (kind, "arm", "to", "tok/s", "requests/s", "ttft p50", "tpot p50", "latency p50")
    table = make_table(headings, "ratios: of throughput more is better, of times less", num_left=3)
    for ratio in ratios:
        figures = (ratio.tokens_per_second, ratio.requests_per_second, ratio.ttft, ratio.tpot, ratio.latency)
        table.add_row(f"{ratio.load:g}", ratio.arm, ratio.to, *map(interval, figures))
    print_tables(table)


def _percentiles(found: "Percentiles | None") -> str:
    if found is None:
        return ""
    return " ".join(
        f"{each.value:.0f}" if each.value >= 10 else f"{each.value:.1f}" for each in (found.p50, found.p90, found.p99)
    )
