"""Options that several commands share, and the config that they make."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, get_args

from specdecode.config import StrictModel, check_config, load_config, with_overrides
from specdecode.log import LogFormat

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = argparse._SubParsersAction

_Config = TypeVar("_Config", bound=StrictModel)


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], help: str, example: str
) -> argparse.ArgumentParser:
    """Adds a command, whose help ends with an example."""
    command = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def add_config(command: argparse.ArgumentParser, such_as: str, file: str | None = None) -> None:
    """Adds --config, which must be given where `file` says what it is like, and --set."""
    config_help = "a YAML file of what is set" if file is None else f"a YAML file, such as {file}"
    command.add_argument("--config", metavar="FILE", required=file is not None, help=config_help)
    add_set(command, such_as)


def add_set(command: argparse.ArgumentParser, such_as: str) -> None:
    """Adds --set, which may be repeated."""
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"set a key, such as {such_as}")


def add_json(command: argparse._ActionsContainer) -> None:
    """Adds --json; `commands.tables.print_json` prints it."""
    command.add_argument("--json", action="store_true", help="print JSON instead, for programs")


def add_log_format(command: argparse.ArgumentParser) -> None:
    """Lets the form of log lines be chosen over the file's."""
    said = "tell on stderr what is done, in lines for people or, as with the file's logging.format, a JSON object on each"
    command.add_argument("--log-format", choices=get_args(LogFormat), help=said)


def optional_config(parsed: argparse.Namespace, kind: type[_Config]) -> _Config:
    """The file's keys if there is a file, with those that are set over them."""
    if parsed.config:
        return load_config(parsed.config, kind, parsed.set)
    return check_config(with_overrides({}, parsed.set), kind, where=parsed.command)
