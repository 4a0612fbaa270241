"""Options that several commands share, and the config that they make."""

import argparse
from typing import TYPE_CHECKING, TypeVar

from specdecode.config import StrictModel, check_config, load_config, with_overrides

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = argparse._SubParsersAction

_Config = TypeVar("_Config", bound=StrictModel)


def optional_config(parsed: argparse.Namespace, kind: type[_Config]) -> _Config:
    """The file's keys if there is a file, with those that are set over them."""
    if parsed.config:
        return load_config(parsed.config, kind, parsed.set)
    return check_config(with_overrides({}, parsed.set), kind, where=parsed.command)
