"""What the jobs' command lines share: a configuration file and overrides in, one library call, an exit status out."""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel

from specdecode.config import load_config
from specdecode.errors import UserError

Config = TypeVar("Config", bound=BaseModel)


def run_job(name: str, description: str, model: type[Config], job: Callable[[Config], str], arguments: list[str] | None) -> int:
    """Runs `job` on the file given with --config and prints what it returns.

    Returns:
        0, or 2 for what the user can fix, which is said in one line.
    """
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{name}", description=description)
    parser.add_argument("--config", required=True, help="a YAML file, such as those under configs/tiny")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        print(job(load_config(options.config, model, options.overrides)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
