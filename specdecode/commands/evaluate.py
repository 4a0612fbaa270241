"""`specdecode evaluate`: a data set in, the quality and speed of decoding with drafts beside plain decoding out."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from specdecode.commands.benchmark import measure
from specdecode.commands.options import Commands, add_command, add_config, add_json, add_log_format
from specdecode.commands.tables import figure, interval, make_table, print_json, print_tables
from specdecode.config import check_config, read_yaml, with_overrides
from specdecode.errors import ConfigError

if TYPE_CHECKING:
    from specdecode.evaluation.contrast import Side
    from specdecode.evaluation.suite import BenchmarkConfig

_CELL = ("dataset", "experiment", "draft", "K", "T")


def add_evaluate(commands: Commands) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "compare the answers and the speed of decoding with drafts and without",
        "specdecode evaluate --config configs/tiny/eval_quick.yaml --dataset code",
    )
    add_config(evaluate, "datasets.0.path=FILE", file="configs/eval_full.yaml")
    evaluate.add_argument("--dataset", metavar="NAME", help="one of the file's, or known by name; all of the file's if unset")
    said = "of pass@k, such as 1,10 with --set temperatures=[0.8] --set num_repeats=20 (default 1)"
    evaluate.add_argument("--pass-k", default="1", metavar="K,...", help=said)
    said = "load no model, and judge the data sets' own solutions, and wrong ones made of them"
    evaluate.add_argument("--check-references", action="store_true", help=said)
    add_json(evaluate)
    add_log_format(evaluate)


def _evaluate(parsed: argparse.Namespace) -> None:
    from specdecode.evaluation.suite import BenchmarkConfig

    values = with_overrides(read_yaml(parsed.config), parsed.set)
    if parsed.dataset is not None:
        values = _only(parsed.dataset, values)
    config = check_config(values | {"report": False}, BenchmarkConfig, where=parsed.config)
    if parsed.check_references:
        _check_references(config, parsed.json)
    else:
        _compare_answers(config, parsed)


def _only(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The same with one data set, as the file has it or by its name, and with a folder of its own."""
    listed = values.get("datasets")
    found = [one for one in listed if isinstance(one, dict) and one.get("name") == name] if isinstance(listed, list) else []
    return values | {"datasets": found or [{"name": name}], "output_dir": f"{values.get('output_dir')}/{name}"}


def _compare_answers(config: "BenchmarkConfig", parsed: argparse.Namespace) -> None:
    from specdecode.evaluation.contrast import contrast, in_words

    ks = _pass_ks(parsed.pass_k, config.num_repeats)
    if len(config.experiments) < 2:
        raise ConfigError(f"experiments: expected baseline and one beside it, got {', '.join(config.experiments)}")
    sides = contrast(measure(config, parsed.log_format, parsed.command), ks)
    words = [in_words(side) for side in sides if not side.is_plain]
    if parsed.json:
        print_json({"sides": sides, "words": words})
        return
    _print_quality(sides, ks)
    _print_speed(sides)
    print("\n".join(words))
    print(f"records are in {config.output_dir}")


def _pass_ks(text: str, num_repeats: int) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise ConfigError(f"--pass-k: expected whole numbers such as 1,10, got {text!r}")
    ks = sorted({int(part) for part in text.split(",")})
    if not 0 < ks[0] <= ks[-1] <= num_repeats:
        raise ConfigError(f"--pass-k: expected at least 1 and at most num_repeats, {num_repeats}, got {text}")
    return ks


def _print_quality(sides: "list[Side]", ks: list[int]) -> None:
    has_perplexity = any(side.perplexity is not None for side in sides)
    named = (*(f"pass@{k}" for k in ks), "to plain", "overlap", "agreement", *(["perplexity"] if has_perplexity else []))
    table = make_table((*_CELL, "answers", *named, "identical"), "quality", num_left=len(_CELL))
    for side in sides:
        table.add_row(
            *_cell(side),
            f"{side.speed.num_answers}" + (f" ({side.speed.num_errors} failed)" if side.speed.num_errors else ""),
            *(interval(side.pass_at.get(k), ".1%") for k in ks),
            *(["", "", ""] if side.is_plain else [interval(side.to_plain, "+.1%"), *_likeness(side)]),
            *([interval(side.perplexity, ".3f")] if has_perplexity else []),
            "" if side.is_plain else f"{side.num_same} of {side.num_compared}",
        )
    print_tables(table)


def _likeness(side: "Side") -> list[str]:
    return [figure(side.overlap, ".1%"), figure(side.agreement, ".1%")]


def _print_speed(sides: "list[Side]") -> None:
    right = ("tok/s", "speed-up", "acceptance", "tokens/pass", "ttft ms", "latency ms", "p99")
    table = make_table((*_CELL, *right), "speed", num_left=len(_CELL))
    for side in sides:
        row = side.speed
        table.add_row(
            *_cell(side),
            interval(row.tokens_per_second, ".1f"),
            "" if side.is_plain else interval(row.speed_up),
            interval(row.acceptance, ".3f"),
            figure(row.tokens_per_pass, ".2f"),
            f"{row.ttft_ms[0]:.1f}" if row.ttft_ms else "",
            *(f"{value:.0f}" for value in row.latency_ms or ()),
        )
    print_tables(table)


def _cell(side: "Side") -> list[str]:
    cell = side.cell
    return [side.dataset, cell.experiment, cell.draft, str(cell.K), f"{cell.temperature:g}"]


def _check_references(config: "BenchmarkConfig", as_json: bool) -> None:
    from specdecode.evaluation.references import check_references
    from specdecode.evaluation.suite import load_items

    with _bar("answers") as tell:
        found = check_references(load_items(config), config.quality.sandbox, tell)
    if as_json:
        print_json(found)
        return
    table = make_table(("dataset", "answers", "judged", "right", "as it should be", "not so"), num_left=2)
    for judged in found:
        score = f"{judged.num_right / judged.num_answers:.3f}"
        as_should = judged.num_answers - len(judged.surprises)
        others = ", ".join(judged.surprises[:3]) + (", ..." if len(judged.surprises) > 3 else "")
        table.add_row(judged.dataset, judged.answers, str(judged.num_answers), score, str(as_should), others)
    print_tables(table)


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, count: progress.update(task, completed=done, total=count)
