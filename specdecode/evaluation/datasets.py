"""A data set's name in, its questions out: what is asked, in which form, and what an answer is judged by.

By name from the Hugging Face Hub, from a copy on disk, from any file with a column of prompts, or the built-in prompts.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import Field, model_validator

from specdecode.config import StrictModel
from specdecode.errors import ConfigError
from specdecode.evaluation.prompts import DOMAINS, MIXED, load_prompts

Judge = Literal["none", "program", "number"]
PromptFormat = Literal["raw", "chat"]


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        id: names it within its data set.
        domain: code, chat or reasoning; of the mixed prompts, what they mix.
        category: the data set's own kind.
        turns: what is asked, one turn after the other's answer; of a raw prompt, the text to be continued.
        format: whether the turns are messages, or one text to be continued.
        judge: how an answer to the last turn is scored: by a program that runs it, by its number, or not at all.
        reference: the program's end, which fails unless the answer is right; or the number.
        prefix: the program's beginning, which an answer goes on.
        stops: texts that end an answer of a raw prompt.
        solution: an answer that is right, if the data set has one.
    """

    id: str
    domain: str
    category: str
    turns: tuple[str, ...]
    format: PromptFormat = "chat"
    judge: Judge = "none"
    reference: str = ""
    prefix: str = ""
    stops: tuple[str, ...] = ()
    solution: str = ""


class DatasetConfig(StrictModel):
    """Which questions are asked."""

    name: str = Field(description="one of those known here, or any name for a file with prompts")
    path: str | None = Field(default=None, description="a file, or a folder with one; the Hugging Face Hub if unset")
    split: str | None = Field(default=None, description="on the Hub, instead of the one that it is usually judged by")
    column: str = Field(default="prompt", description="of another file: a text, or messages with role and content")
    format: Literal["auto", "raw", "chat"] = Field(
        default="auto", description="ask for a text's continuation, or in a chat; auto: as the data set is usually asked"
    )
    domain: str = Field(default="chat", description="of another file: which draft is at home there")
    limit: int | None = Field(default=None, gt=0, description="only the first so many")

    @model_validator(mode="after")
    def _check(self) -> "DatasetConfig":
        known = sorted([*_READERS, *_BUILTIN])
        if self.path is None and self.name not in known:
            raise ValueError(f"name: expected one of {', '.join(known)}, or a path beside it")
        if self.path is None and self.name in _READERS and _READERS[self.name].hub is None:
            raise ValueError(f"path: expected a copy of {self.name}, which is not on the Hub")
        if self.format == "raw" and self.name in ("mt_bench", "spec_bench", "alpaca"):
            raise ValueError(f"format: expected chat, as {self.name} has questions and no texts to continue")
        return self


class Dataset:
    """Questions, by their place.

    Args:
        config: which.

    Raises:
        ConfigError: there is no such data set, or its rows are not what they should be.
    """

    def __init__(self, config: DatasetConfig) -> None:
        self.name = config.name
        items = list(_items(config))
        if not items:
            raise ConfigError(f"{_where(config)}: expected questions, found none")
        names = [item.id for item in items]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{_where(config)}: expected each question to have a name of its own, got {twice!r} twice")
        self._items = items[: config.limit]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: int) -> Item:
        return self._items[place]

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)


_Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Reader:
    """Where a data set is on the Hub (name, configuration, split), and what a row of it asks in either format."""

    hub: tuple[str, str | None, str] | None
    usual: PromptFormat
    item: Callable[[_Row, PromptFormat, int], Item]


def _humaneval(row: _Row, format: PromptFormat, number: int) -> Item:
    del number
    task = f"Complete this Python function. Answer with the whole function.\n\n```python\n{row['prompt'].rstrip()}\n```"
    return Item(
        id=str(row["task_id"]),
        domain="code",
        category="humaneval",
        turns=(row["prompt"] if format == "raw" else task,),
        format=format,
        judge="program",
        reference=f"{row['test']}\ncheck({row['entry_point']})\n",
        prefix=row["prompt"],
        stops=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@") if format == "raw" else (),
        solution=row["canonical_solution"] if format == "raw" else f"```python\n{row['prompt']}{row['canonical_solution']}```",
    )


def _mbpp(row: _Row, format: PromptFormat, number: int) -> Item:
    del number
    tests = "\n".join(row["test_list"])
    text = f'"""\n{row["text"]}\n{tests}\n"""\n'
    task = f"{row['text']} Your code should pass these tests:\n\n{tests}"
    return Item(
        id=str(row["task_id"]),
        domain="code",
        category="mbpp",
        turns=(text if format == "raw" else task,),
        format=format,
        judge="program",
        reference=f"{row.get('test_setup_code') or ''}\n{tests}\n",
        stops=("\nclass ", "\nassert ", '\n"""', "\nprint(", "\nif ") if format == "raw" else (),
        solution=row["code"] if format == "raw" else f"```python\n{row['code']}\n```",
    )


def _gsm8k(row: _Row, format: PromptFormat, number: int) -> Item:
    answer = number_in(row["answer"])
    if answer is None:
        raise ValueError(f"answer: expected a number after ####, got {row['answer'][-40:]!r}")
    return _problem(f"{number}", "gsm8k", row["question"].strip(), answer, format, row["answer"])


def _svamp(row: _Row, format: PromptFormat, number: int) -> Item:
    body = row["Body"].strip()
    question = f"{body}{'' if body.endswith(('.', '?', '!')) else '.'} {row['Question'].strip()}"
    return _problem(str(row.get("ID", number)), "svamp", question, _plain(float(row["Answer"])), format, str(row["Answer"]))


def _problem(name: str, category: str, question: str, answer: str, format: PromptFormat, solution: str) -> Item:
    text = f"Question: {question}\nAnswer:" if format == "raw" else question
    stops = ("\nQuestion:",) if format == "raw" else ()
    return Item(name, "reasoning", category, (text,), format, "number", answer, stops=stops, solution=solution)


def _questions(row: _Row, format: PromptFormat, number: int) -> Item:
    turns = row["turns"] if "turns" in row else row["prompt"]  # the second is the Hub's
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise ValueError(f"turns: expected a list of texts, got {turns!r}")
    name = str(row.get("question_id", row.get("prompt_id", number)))
    category = str(row.get("category", ""))
    return Item(name, _DOMAINS.get(category, "chat"), category, tuple(turns), format)


_DOMAINS = {
    "coding": "code",
    "math": "reasoning",
    "reasoning": "reasoning",
    "math_reasoning": "reasoning",
    "counterfactual": "reasoning",
    "fermi": "reasoning",
}


def _alpaca(row: _Row, format: PromptFormat, number: int) -> Item:
    text = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    return Item(str(number), "chat", "alpaca", (text,), format)


_READERS: dict[str, _Reader] = {
    "humaneval": _Reader(("openai/openai_humaneval", None, "test"), "raw", _humaneval),
    "mbpp": _Reader(("google-research-datasets/mbpp", "full", "test"), "raw", _mbpp),
    "gsm8k": _Reader(("openai/gsm8k", "main", "test"), "chat", _gsm8k),
    "svamp": _Reader(("ChilleD/SVAMP", None, "test"), "chat", _svamp),
    "mt_bench": _Reader(("HuggingFaceH4/mt_bench_prompts", None, "train"), "chat", _questions),
    "vicuna_bench": _Reader(None, "chat", _questions),
    "spec_bench": _Reader(None, "chat", _questions),
    "alpaca": _Reader(("tatsu-lab/alpaca", None, "train"), "chat", _alpaca),
}
_BUILTIN = ("builtin", *DOMAINS, MIXED)


def _items(config: DatasetConfig) -> Iterator[Item]:
    if config.path is None and config.name in _BUILTIN:
        for domain in DOMAINS if config.name == "builtin" else (config.name,):
            for prompt in load_prompts(domain):
                yield Item(prompt.id, prompt.domain, domain, (prompt.prompt,), prompt.format)
        return
    rows = _file_rows(Path(config.path)) if config.path is not None else _hub_rows(config)
    for number, row in enumerate(rows):
        yield _item(row, config, number)


def _item(row: _Row, config: DatasetConfig, number: int) -> Item:
    reader = _READERS.get(config.name)
    try:
        if reader is None:
            return _any(row, config, number)
        return reader.item(row, reader.usual if config.format == "auto" else config.format, number)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"no column {error}" if isinstance(error, KeyError) else error
        has = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ConfigError(f"{_where(config)}, row {number}: expected a row of {config.name}: {what}; it has {has}") from error


def _any(row: _Row, config: DatasetConfig, number: int) -> Item:
    value = row[config.column]
    if isinstance(value, list):
        value = tuple(turn["content"] for turn in value if turn["role"] == "user")
    elif not isinstance(value, str):
        raise ValueError(f"{config.column}: expected a text or messages, got {type(value).__name__}")
    turns = value if isinstance(value, tuple) else (value,)
    if not turns or (len(turns) > 1 and config.format == "raw"):
        raise ValueError(f"{config.column}: expected one text to continue, got {len(turns)} messages")
    return Item(str(number), config.domain, config.name, turns, "raw" if config.format == "raw" else "chat")


def _where(config: DatasetConfig) -> str:
    return f"dataset {config.name}" + (f" at {config.path}" if config.path is not None else "")


def _hub_rows(config: DatasetConfig) -> Iterator[_Row]:
    from datasets import load_dataset  # which takes a second

    hub = _READERS[config.name].hub
    assert hub is not None, "a data set that is not on the Hub has a path"
    name, part, split = hub
    try:
        yield from load_dataset(name, part, split=config.split or split)
    except Exception as error:  # the library raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{_where(config)}: {name} cannot be loaded from the Hub: {reason}; path takes a copy") from error


def _file_rows(path: Path) -> list[_Row]:
    """Rows of JSON lines, a JSON list or Parquet, or of the only such file in a folder."""
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if re.search(r"\.(jsonl|json|parquet)(\.gz)?$", file.name)]
        if len(files) != 1:
            raise ConfigError(f"{path}: expected one file of JSON lines, JSON or Parquet, found {len(files)}")
        [path] = files
    try:
        if path.suffix == ".parquet":
            rows: list[_Row] = pq.read_table(path).to_pylist()
            return rows
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            text = file.read()
        if ".jsonl" in path.suffixes:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        found = json.loads(text)
    except (OSError, ValueError) as error:  # pyarrow's and json's own are such
        raise ConfigError(f"{path}: cannot be read as rows: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, list):
        raise ConfigError(f"{path}: expected a list of rows, got {type(found).__name__}")
    return found


_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def number_in(answer: str) -> str | None:
    """The number that an answer comes to: what is said last after ####, else the last number in it; None if it has none."""
    marked = answer.rpartition("####")
    found = _NUMBER.findall(marked[2])
    if not found:
        return None
    said = (found[0] if marked[1] else found[-1]).replace("$", "").replace(",", "")
    try:
        return _plain(_value(said))
    except (ValueError, ZeroDivisionError):
        return None


def _value(text: str) -> float:
    numerator, _, denominator = text.partition("/")
    return float(numerator) / float(denominator or 1)


def _plain(value: float) -> str:
    """A number as it is compared: 3.0 is 3."""
    return str(int(value)) if value == int(value) else f"{value:.6g}"
