"""Documents are read completely, and split the same way everywhere."""

from pathlib import Path

import pytest

from specdecode.errors import ConfigError
from specdecode.training.documents import Document, Message, is_held_out, load_documents


def test_about_two_percent_are_held_out() -> None:
    num_held_out = sum(is_held_out(Document(text=f"document {index}")) for index in range(20_000))

    assert 340 < num_held_out < 600  # 6 of 256 is 469; six standard deviations of 21 to either side


def test_conversations_with_one_beginning_stay_on_one_side() -> None:
    question = Message("user", "What is this?")
    answers = [Document(messages=(question, Message("assistant", f"answer {index}"))) for index in range(50)]

    assert len({is_held_out(document) for document in answers}) == 1


def test_calculator_notes_are_removed(data_dir: Path) -> None:
    answers = [document.messages[1].content for document in load_documents("gsm8k", data_dir)]

    assert answers[23] == "There are 1 and 3 apples. 1 + 3 = 4 apples.\n#### 4"
    assert not any("<<" in answer for answer in answers)


def test_the_standard_library_comes_without_its_tests(tmp_path: Path) -> None:
    documents = load_documents("standard_library", tmp_path)

    assert len(documents) > 200
    assert any("class JSONEncoder" in document.text for document in documents)
    assert not any(document.text.startswith("# Test suite for") for document in documents)


def test_a_missing_data_directory_is_named_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gsm8k: .*train\.jsonl does not exist") as error:
        load_documents("gsm8k", tmp_path)

    assert "\n" not in str(error.value)


def test_an_unknown_source_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nonsense: unknown; the known ones are standard_library, mbpp"):
        load_documents("nonsense", tmp_path)
