"""YAML in, one frozen and checked object out. Knows nothing of what the fields mean.

Each configuration model is defined beside the thing that it configures, as a subclass of `StrictModel`.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from specdecode.errors import ConfigError


class StrictModel(BaseModel):
    """A frozen configuration model that refuses unknown keys and silent conversions such as "5" to 5."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Takes 1e-4 for a number, as YAML 1.2 does; to YAML 1.1 it is a word."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


def load_config(path: str | Path, model: type[Model], overrides: Iterable[str] = ()) -> Model:
    """Reads the YAML file at `path`, applies `overrides` such as `"training.seed=1"`, and checks the result.

    Raises:
        ConfigError: the file is missing or no YAML mapping, or a key is unknown, missing or of the wrong type. The message
            is one line with the file, the key, the value and what was expected.
    """
    return check_config(with_overrides(read_yaml(path), overrides), model, where=str(path))


def with_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Applies overrides such as `"training.seed=1"` to `values`, in place, and returns them."""
    for override in overrides:
        _apply_override(values, override)
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file whose top level is a mapping."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top level, got {type(values).__name__}")
    return values


def check_config(values: dict[str, Any], model: type[Model], where: str) -> Model:
    """Checks `values` against `model`; `where` is what the error message calls their origin."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe_validation_error(error)}") from error


def describe_validation_error(error: ValidationError) -> str:
    """Says in one line what the first problem is: the key, what was expected, and the value that was there."""
    first, *rest = error.errors()
    key = ".".join(map(str, first["loc"])) or "top level"
    message = {"extra_forbidden": "unknown key", "missing": "missing"}.get(first["type"], _lower_first(first["msg"]))
    value = "" if first["type"] == "missing" else f", got {_shorten(first['input'])}"
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{key}: {message}{value}{more}"


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected key=value, such as training.seed=1")
    *parents, last = key.split(".")
    place: Any = values
    for parent in parents:
        place = place.setdefault(parent, {}) if isinstance(place, dict) else place[_position(place, parent, override)]
        if not isinstance(place, dict | list):
            raise ConfigError(f"--set {override}: {parent} is a value, not a section")
    place[last if isinstance(place, dict) else _position(place, last, override)] = _parse_value(text, override)


def _position(values: list[Any], text: str, override: str) -> int:
    if not text.isdecimal() or int(text) >= len(values):
        raise ConfigError(f"--set {override}: expected a place in a list of {len(values)}, from 0, got {text}")
    return int(text)


def _parse_value(text: str, override: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from error


def _lower_first(text: str) -> str:
    text = text.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]


def _shorten(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
