"""What is logged in, lines on stderr out: for people, or one JSON object each for programs. Knows nothing of what is logged."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["text", "json"]

# Loggers of libraries that write to stderr by handlers of their own.
_OTHERS = ("transformers", "datasets", "huggingface_hub", "sentence_transformers", "ray", "ray.data", "ray.serve", "ray.train")


@contextmanager
def logging_to_stderr(format: LogFormat, level: int = logging.INFO, **about: str) -> Iterator[None]:
    """Writes all lines of `level` and above to stderr for as long as the context lasts.

    A JSON line has `time` (UTC), `level`, `logger`, `message`, what `about` says of all lines, and what a logger is given as
    `extra`. Then warnings, and what other libraries would print for people, are such lines too.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_json(about) if format == "json" else logging.Formatter("%(asctime)s %(message)s"))
    root, httpx = logging.getLogger(), logging.getLogger("httpx")
    before = root.level, httpx.level
    root.addHandler(handler)
    root.setLevel(level)
    httpx.setLevel(max(level, logging.WARNING))  # it has a line for each request
    try:
        if format == "json":
            with _others_pass_on():
                yield
        else:
            yield
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        httpx.setLevel(before[1])


def _json(about: dict[str, str]) -> logging.Formatter:
    names = {"levelname": "level", "name": "logger"}
    return JsonFormatter("%(levelname)s%(name)s%(message)s", rename_fields=names, timestamp="time", static_fields=about)


@contextmanager
def _others_pass_on() -> Iterator[None]:
    """Has the lines of other libraries, and warnings, go to the root's handlers instead of their own."""
    loggers = [logging.getLogger(name) for name in _OTHERS]
    before = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [], True
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
