"""Rows become examples, those that cannot be used are counted, and what is held out is never learned from."""

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdecode.errors import ConfigError
from specdecode.training.data import (
    DataConfig,
    Reading,
    read_blocks,
    tokenize,
    training_blocks,
    validation_blocks,
    write_blocks,
)
from specdecode.training.documents import load_documents
from specdecode.training.examples import Example


def reading_of(rows: list[dict[str, Any]], model_folder: str, **config: Any) -> Reading:
    """What is read of a data set with these rows."""
    settings = DataConfig(**({"domain": "reasoning", "dataset_name": "rows"} | config))
    reading = Reading.of(settings)
    columns = {name: np.array([row[name] for row in rows], dtype=object) for name in rows[0]}
    found = tokenize(columns, settings.model_dump(), model_folder)
    for values in zip(*found.values(), strict=True):
        reading.add(dict(zip(found, values, strict=True)))
    return reading


def test_the_split_is_disjoint_complete_and_the_same_every_time(model_folder: str, data_dir: Path) -> None:
    rows = [{"source": "gsm8k", "document": json.dumps(asdict(d))} for d in load_documents("gsm8k", data_dir)]
    options = {"dataset_name": None, "sources": {"gsm8k": 1.0}}
    reading, again = (reading_of(rows, model_folder, **options) for _ in range(2))
    training, held_out = ({tuple(e.ids.tolist()) for e in part["gsm8k"]} for part in (reading.training, reading.held_out))
    assert len(training) + len(held_out) == 200
    assert not training & held_out
    assert [e.ids.tolist() for e in again.held_out["gsm8k"]] == [e.ids.tolist() for e in reading.held_out["gsm8k"]]


@pytest.mark.parametrize(
    ("domain", "row", "cause"),
    [
        ("reasoning", {"question": "", "answer": "4"}, "without text"),
        ("reasoning", {"question": "How?", "answer": None}, "without text"),
        ("reasoning", {"question": "How?", "answer": float("nan")}, "without text"),
        ("code", {"content": " \n"}, "without text"),
        ("chat", {"messages": None}, "without turns of role and content"),
        ("chat", {"messages": []}, "without turns of role and content"),
        ("chat", {"messages": [{"role": "user"}]}, "without turns of role and content"),
        ("chat", {"messages": [{"role": "user", "content": "Hi"}]}, "with nothing to learn"),
    ],
)
def test_a_row_that_cannot_be_used_is_counted(model_folder: str, domain: str, row: dict[str, Any], cause: str) -> None:
    reading = reading_of([row] * 3, model_folder, domain=domain)
    assert reading.unusable == {cause: 3}
    with pytest.raises(ConfigError, match=f"3 left out, 3 {cause}"):
        reading.check()


def test_a_number_is_a_text_too(model_folder: str) -> None:
    reading = reading_of([{"question": "2 + 2?", "answer": 4}], model_folder)
    assert reading.unusable.total() == 0


def test_nothing_on_one_side_is_an_error_unless_other_sources_have_something(model_folder: str) -> None:
    same_side = reading_of([{"question": "a", "answer": "b"}] * 9, model_folder)
    with pytest.raises(ConfigError, match="documents of rows to learn from and to hold out"):
        same_side.check()
    example = Example.of([1, 2], [False, True])
    reading = Reading({"full": [example], "empty": []}, {"full": [example], "empty": []})
    reading.check(needs_all=False)
    with pytest.raises(ConfigError, match="documents of empty"):
        reading.check()


def test_blocks_come_back_from_disk_as_they_were(examples: list[Example], tmp_path: Path) -> None:
    blocks = list(islice(training_blocks({"gsm8k": examples}, {"gsm8k": 1.0}, 32, 0, seed=3), 300))
    assert write_blocks(tmp_path / "blocks.parquet", [("a", blocks[:200]), ("b", blocks[200:])]) == 300
    read = read_blocks(tmp_path / "blocks.parquet")
    assert read["group"] == ["a"] * 200 + ["b"] * 100
    for name in ("input_ids", "position_ids", "labels"):
        np.testing.assert_array_equal(np.array(read[name]), np.stack([getattr(block, name) for block in blocks]))


def test_validation_reads_no_document_twice(examples: list[Example]) -> None:
    few = validation_blocks({"gsm8k": examples[:5]}, 100, 16, 0, seed=1)["gsm8k"]
    assert sum((block.labels != -100).sum() for block in few) <= sum(example.is_scored.sum() for example in examples[:5])
    assert len(validation_blocks({"gsm8k": examples}, 3, 16, 0, seed=1)["gsm8k"]) == 3
