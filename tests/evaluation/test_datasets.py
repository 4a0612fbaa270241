"""Every data set is read from its usual columns, by whichever file it comes in; what is none is one clear line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from specdecode.errors import ConfigError
from specdecode.evaluation.datasets import Dataset, DatasetConfig, number_in

HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": 'import math\n\n\ndef half(number):\n    """Half of the number, rounded down."""\n',
    "entry_point": "half",
    "canonical_solution": "    return math.floor(number / 2)\n",
    "test": "def check(candidate):\n    assert candidate(7) == 3\n    assert candidate(-1) == -1\n",
}
MBPP = {
    "task_id": 901,
    "text": "Write a function to double a number.",
    "code": "def double(number):\r\n    return SCALE * number",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
    "test_setup_code": "SCALE = 2",
}
GSM8K = {"question": "Tom has 1,000 pens and buys 250. How many are there?", "answer": "1000 + 250 = 1250\n#### 1,250"}
SVAMP = {"ID": "chal-9", "Body": "There are 8 cats", "Question": "How many legs are there?", "Answer": 32.0}
MT_BENCH = {"question_id": 81, "category": "coding", "turns": ["Sort a list.", "Now backwards."]}
ALPACA = {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}
ROWS: dict[str, dict[str, Any]] = {
    "humaneval": HUMANEVAL,
    "mbpp": MBPP,
    "gsm8k": GSM8K,
    "svamp": SVAMP,
    "mt_bench": MT_BENCH,
    "vicuna_bench": MT_BENCH,
    "spec_bench": MT_BENCH,
    "alpaca": ALPACA,
}


def read(tmp_path: Path, name: str, rows: list[Any], file: str = "rows.jsonl", **options: Any) -> Dataset:
    text = "\n".join(json.dumps(row) for row in rows) if ".jsonl" in file else json.dumps(rows)
    if file.endswith(".gz"):
        with gzip.open(tmp_path / file, "wt") as packed:
            packed.write(text)
    elif file.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / file)
    else:
        (tmp_path / file).write_text(text)
    return Dataset(DatasetConfig(name=name, path=str(tmp_path / file), **options))


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_a_copy_is_read_whatever_its_file(tmp_path: Path, name: str, file: str) -> None:
    dataset = read(tmp_path, name, [ROWS[name]], file)
    assert len(dataset) == 1
    assert list(dataset) == [dataset[0]]
    assert all(dataset[0].turns)
    assert dataset.name == name


def test_what_is_asked(tmp_path: Path) -> None:
    item = read(tmp_path, "humaneval", [HUMANEVAL])[0]
    assert (item.id, item.domain, item.format, item.turns) == ("HumanEval/900", "code", "raw", (HUMANEVAL["prompt"],))
    assert "\ndef " in item.stops
    chat = read(tmp_path, "humaneval", [HUMANEVAL], format="chat")[0]
    assert chat.format == "chat"
    assert chat.turns[0].startswith("Complete this Python function.")
    assert chat.stops == ()
    raw = read(tmp_path, "mbpp", [MBPP])[0]
    assert raw.turns[0].startswith('"""\nWrite a function to double a number.\nassert double(2) == 4')
    assert read(tmp_path, "gsm8k", [GSM8K], format="raw")[0].turns == (f"Question: {GSM8K['question']}\nAnswer:",)
    assert read(tmp_path, "gsm8k", [GSM8K])[0].reference == "1250"
    svamp = read(tmp_path, "svamp", [SVAMP])[0]
    assert (svamp.turns, svamp.reference) == (("There are 8 cats. How many legs are there?",), "32")
    question = read(tmp_path, "mt_bench", [MT_BENCH])[0]
    assert (question.id, question.domain, question.category) == ("81", "code", "coding")
    assert question.turns == ("Sort a list.", "Now backwards.")
    assert read(tmp_path, "alpaca", [ALPACA])[0].turns == ("Translate.\n\nGuten Tag",)


def test_the_hub_s_columns_of_mt_bench_do_as_well(tmp_path: Path) -> None:
    row = {"prompt": ["One.", "Two."], "prompt_id": 7, "category": "math", "reference": []}
    item = read(tmp_path, "mt_bench", [row])[0]
    assert (item.id, item.turns, item.domain) == ("7", ("One.", "Two."), "reasoning")


def test_any_file_with_prompts(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    dataset = read(tmp_path, "mine", [{"text": "Hello"}, {"text": messages}], column="text", domain="code")
    assert [item.turns for item in dataset] == [("Hello",), ("a", "b")]
    assert {(item.domain, item.format, item.category) for item in dataset} == {("code", "chat", "mine")}
    assert read(tmp_path, "mine", [{"prompt": "Once"}], format="raw")[0].format == "raw"
    assert len(read(tmp_path, "mine", [{"prompt": "a"}, {"prompt": "b"}], limit=1)) == 1


@pytest.mark.parametrize("name", ["builtin", "code", "chat", "reasoning", "mixed"])
def test_built_in_prompts(name: str) -> None:
    dataset = Dataset(DatasetConfig(name=name))
    assert len(dataset) == {"builtin": 180, "mixed": 40}.get(name, 60)
    assert len({item.turns for item in dataset}) == len(dataset)


def test_a_folder_holds_one_file(tmp_path: Path) -> None:
    read(tmp_path, "gsm8k", [GSM8K])
    (tmp_path / "LICENSE.txt").write_text("MIT")
    assert len(Dataset(DatasetConfig(name="gsm8k", path=str(tmp_path)))) == 1
    (tmp_path / "more.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected one file of JSON lines, JSON or Parquet, found 2"):
        Dataset(DatasetConfig(name="gsm8k", path=str(tmp_path)))


def test_the_hub_is_asked_by_the_usual_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, part: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, part, split))
        return [GSM8K]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert Dataset(DatasetConfig(name="gsm8k"))[0].reference == "1250"
    Dataset(DatasetConfig(name="gsm8k", split="train"))
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]


def test_a_hub_that_is_not_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ConfigError, match=r"^dataset svamp: ChilleD/SVAMP cannot be loaded from the Hub: Couldn't reach the Hub;"
    ):
        Dataset(DatasetConfig(name="svamp"))


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("humaneval", [], "dataset humaneval at .*: expected questions, found none"),
        ("humaneval", [GSM8K], r"row 0: expected a row of humaneval: no column 'prompt'; it has \['answer', 'question'\]"),
        ("gsm8k", [GSM8K, {**GSM8K, "answer": "none"}], "row 1: .* expected a number after ####"),
        ("svamp", [{**SVAMP, "Answer": "many"}], "row 0: .* could not convert"),
        ("mt_bench", [{**MT_BENCH, "turns": "one"}], "expected a list of texts, got 'one'"),
        ("mt_bench", [MT_BENCH, MT_BENCH], "a name of its own, got '81' twice"),
        ("mine", [{"prompt": 3}], "prompt: expected a text or messages, got int"),
        ("mine", [{"prompt": []}], "expected one text to continue, got 0 messages"),
        ("mine", ["text"], "row 0: expected a row of mine: .*; it has str"),
    ],
)
def test_rows_that_cannot_be_used_are_told(tmp_path: Path, name: str, rows: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, name, rows)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", "{"), ("b.json", "{}"), ("c.parquet", "none"), ("d.jsonl.gz", "none")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=r"cannot be read as rows|expected a list of rows"):
            Dataset(DatasetConfig(name="gsm8k", path=str(tmp_path / name)))
    with pytest.raises(ConfigError, match=r"cannot be read as rows: .*No such file"):
        Dataset(DatasetConfig(name="gsm8k", path=str(tmp_path / "missing.jsonl")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "human_eval"}, "expected one of alpaca, builtin, .*, or a path beside it"),
        ({"name": "spec_bench"}, "expected a copy of spec_bench, which is not on the Hub"),
        ({"name": "mt_bench", "format": "raw"}, "expected chat, as mt_bench has questions"),
    ],
)
def test_names_that_are_none_are_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DatasetConfig(**values)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("#### 42", "42"),
        ("It is 3 and 4, so\n#### 1,250 pens", "1250"),
        ("The answer is 12.50.", "12.5"),
        ("He pays $1,200", "1200"),
        ("3 + 4 = 7", "7"),
        ("-5 degrees", "-5"),
        ("one half is 1/2", "0.5"),
        ("1/0", None),
        ("none", None),
        ("", None),
        ("5 ####", None),
    ],
)
def test_the_number_that_an_answer_comes_to(answer: str, number: str | None) -> None:
    assert number_in(answer) == number
