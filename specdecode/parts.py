"""Work in parts, each a file that is there whole or not at all: what was stopped goes on with those that are missing."""

import json
from pathlib import Path
from typing import Any

from specdecode.errors import ConfigError

_ABOUT = "about.json"


class Parts:
    """A folder of parts.

    Args:
        folder: where they are.
        about: what they are made of.

    Raises:
        ConfigError: the folder holds parts that are made of something else.
    """

    def __init__(self, folder: str | Path, about: dict[str, Any]) -> None:
        self._folder = Path(folder)
        told = json.dumps(about, sort_keys=True)
        path = self._folder / _ABOUT
        if path.exists() and path.read_text(encoding="utf-8") != told:
            raise ConfigError(f"{folder} holds what was made with another configuration: expected a new folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_text(told, encoding="utf-8")

    def missing(self, count: int) -> list[int]:
        """Which of the first `count` parts are not there."""
        return [number for number in range(count) if not part_path(self._folder, number).exists()]

    def paths(self, count: int) -> list[Path]:
        """Where the first `count` parts are, in their order."""
        return [part_path(self._folder, number) for number in range(count)]


def part_path(folder: str | Path, number: int) -> Path:
    """Where a part is."""
    return Path(folder) / f"part-{number:05}.parquet"
