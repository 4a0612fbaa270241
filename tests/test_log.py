"""Log lines are for people, or an object each; and what was logged to before the context is as it was after it."""

import json
import logging
import warnings
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from jobs.command import run_job
from specdecode.config import StrictModel
from specdecode.log import logging_to_stderr
from specdecode.training.reporting import LoggingConfig

logger = logging.getLogger("tests.log")


class JobConfig(StrictModel):
    """Of a job that logs one line."""

    logging: LoggingConfig = LoggingConfig()


class Plain(StrictModel):
    """Of a job whose file has no word on logging."""


def job(config: BaseModel) -> str:
    logger.info("step %d\nis done", 3, extra={"step": 3, "run": str(type(config).__name__)})
    return "done"


def test_json_lines_are_objects_with_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("json", command="benchmark"):
        logger.info("part %d\nis there", 7, extra={"part": 7, "run": "results/é"})
        logging.getLogger("transformers").warning("of a library")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("careful", stacklevel=1)
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logger.exception("failed")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["level"] for line in lines] == ["INFO", "WARNING", "WARNING", "ERROR"]
    first = lines[0]
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": "tests.log",
        "message": "part 7\nis there",
        "command": "benchmark",
        "part": 7,
        "run": "results/é",
    }
    assert lines[1]["message"] == "of a library"
    assert "careful" in lines[2]["message"]
    assert "two\nlines" in lines[3]["exc_info"]
    assert all(line["command"] == "benchmark" for line in lines)


def test_lines_for_people_have_the_time_and_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_stderr("text", logging.WARNING):
        logger.info("not this one")
        logger.warning("this one")
        logging.getLogger("httpx").info("nor a request")
    [line] = capsys.readouterr().err.splitlines()
    assert line[:2] == "20"
    assert line.endswith(" this one")


def test_all_is_as_it_was_afterwards() -> None:
    root, other = logging.getLogger(), logging.getLogger("transformers")
    other.handlers, other.propagate = [logging.NullHandler()], False
    before = list(root.handlers), root.level, list(other.handlers), other.propagate, warnings.showwarning
    with pytest.raises(KeyError), logging_to_stderr("json"):
        assert other.propagate
        raise KeyError
    assert before == (root.handlers, root.level, other.handlers, other.propagate, warnings.showwarning)


@pytest.mark.parametrize(
    ("model", "values", "options", "is_json"),
    [
        (JobConfig, {"logging": {"format": "json"}}, [], True),
        (JobConfig, {"logging": {"format": "json"}}, ["--log-format", "text"], False),
        (JobConfig, {}, ["--log-format", "json"], True),
        (JobConfig, {}, [], False),
        (Plain, {}, [], False),
        (Plain, {}, ["--log-format", "json"], True),
    ],
)
def test_a_job_writes_as_its_file_or_its_command_line_says(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: type[BaseModel],
    values: dict[str, object],
    options: list[str],
    is_json: bool,
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(values))
    assert run_job("trial", "Tries it.", model, job, ["--config", str(file), *options]) == 0
    printed = capsys.readouterr()
    assert printed.out == "done\n"
    if is_json:
        [line] = map(json.loads, printed.err.splitlines())
        assert (line["job"], line["step"], line["run"]) == ("trial", 3, model.__name__)
    else:
        assert printed.err.endswith(" step 3\nis done\n")
