"""What the jobs' command lines share: a configuration file and overrides in, one library call, an exit status out."""

import argparse
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, get_args

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from specdecode.config import load_config
from specdecode.errors import UserError
from specdecode.log import LogFormat, logging_to_stderr

Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True)
class Verdict:
    """What a job that puts something to the test has found, and whether all of it is as it should be."""

    text: str
    is_good: bool


def run_job(
    name: str,
    description: str,
    model: type[Config],
    job: Callable[..., str | Verdict],
    arguments: list[str] | None,
    *,
    can_resume: bool = False,
) -> int:
    """Runs `job` on the file given with --config, and whether to resume if it can, and prints what it returns.

    Returns:
        0; 1 after a verdict that is not good; 2 for what the user can fix, which is said in one line.
    """
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{name}", description=description)
    parser.add_argument("--config", required=True, help="a YAML file, such as those under configs/tiny")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    if can_resume:
        parser.add_argument("--resume", action="store_true", help="go on with the run that output_dir holds")
    parser.add_argument("--log-format", choices=get_args(LogFormat), help="instead of the file's; json: an object on each line")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, model, options.overrides)
        with logging_to_stderr(options.log_format or _log_format(config), job=name):
            result = job(config, options.resume) if can_resume else job(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    verdict = result if isinstance(result, Verdict) else Verdict(result, is_good=True)
    print(verdict.text)
    return 0 if verdict.is_good else 1


def _log_format(config: BaseModel) -> LogFormat:
    """What the file asks for, if it is of a kind that has a section for that."""
    found: LogFormat = getattr(getattr(config, "logging", None), "format", "text")
    return found


def as_text(*tables: Table) -> str:
    """Tables as they are printed."""
    text = io.StringIO()
    console = Console(file=text, width=140)
    for table in tables:
        console.print(table)
    return text.getvalue()
