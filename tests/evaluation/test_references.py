"""Solutions of every data set are judged right, and wrong answers made of them are not, in either format."""

from pathlib import Path
from typing import Any

import pytest

from specdecode.errors import ConfigError
from specdecode.evaluation.datasets import Item
from specdecode.evaluation.references import check_references
from specdecode.evaluation.sandbox import SandboxConfig
from tests.evaluation.test_datasets import GSM8K, HUMANEVAL, MBPP, MT_BENCH, SVAMP, read

SANDBOX = SandboxConfig(timeout_s=20)


@pytest.mark.parametrize("format", ["raw", "chat"])
@pytest.mark.parametrize(("name", "row"), [("humaneval", HUMANEVAL), ("mbpp", MBPP), ("gsm8k", GSM8K), ("svamp", SVAMP)])
def test_solutions_are_right_and_wrong_ones_are_not(tmp_path: Path, name: str, row: dict[str, Any], format: str) -> None:
    found = check_references([(name, item) for item in read(tmp_path, name, [row], format=format)], SANDBOX)
    assert {judged.is_good for judged in found} == {True, False}
    for judged in found:
        assert judged.dataset == name
        assert (judged.num_answers, judged.num_right, judged.surprises) == (1, int(judged.is_good), [])


def test_a_solution_that_fails_is_named(tmp_path: Path) -> None:
    bad = {**MBPP, "task_id": 902, "code": "def double(number):\n    return 3"}
    told: list[tuple[int, int]] = []
    items = [("mbpp", item) for item in read(tmp_path, "mbpp", [MBPP, bad])]
    own, emptied = check_references(items, SANDBOX, lambda done, count: told.append((done, count)))
    assert (own.num_answers, own.num_right, own.surprises) == (2, 1, ["902"])
    assert (emptied.num_answers, emptied.num_right, emptied.surprises) == (2, 0, [])
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_number_is_found_as_it_is_written(tmp_path: Path) -> None:
    """1,250 behind the marks is 1250 in a sentence too, and a scorer that reads it as 1 is found out."""
    [item] = read(tmp_path, "gsm8k", [GSM8K])
    assert all(not judged.surprises for judged in check_references([("gsm8k", item)], SANDBOX))
    wrong = Item(**{**vars(item), "reference": "1"})
    surprised = {judged.answers for judged in check_references([("gsm8k", wrong)], SANDBOX) if judged.surprises}
    assert surprised == {"its own solution", "its number in a sentence"}


def test_a_data_set_that_nobody_can_judge_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a data set with solutions that are judged, such as humaneval"):
        check_references([("mt_bench", item) for item in read(tmp_path, "mt_bench", [MT_BENCH])], SANDBOX)
