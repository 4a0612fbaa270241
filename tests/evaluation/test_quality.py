"""Right answers are right and wrong ones are not, in either format; likeness and pass@k are those of their definitions."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from specdecode.backends.backend import Row
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.evaluation.quality import agreement, is_right, overlap, pass_at_k, perplexity
from specdecode.evaluation.sandbox import SandboxConfig
from tests.evaluation.test_datasets import GSM8K, HUMANEVAL, MBPP, MT_BENCH, SVAMP, read

SANDBOX = SandboxConfig(timeout_s=20)


@pytest.mark.parametrize("format", ["raw", "chat"])
@pytest.mark.parametrize(("name", "row"), [("humaneval", HUMANEVAL), ("mbpp", MBPP), ("gsm8k", GSM8K), ("svamp", SVAMP)])
def test_a_data_set_s_own_solution_is_right_and_another_is_not(
    tmp_path: Path, name: str, row: dict[str, Any], format: str
) -> None:
    item = read(tmp_path, name, [row], format=format)[0]
    assert is_right(item, item.solution, SANDBOX)
    for wrong in ("", "    return 41\n", "```python\ndef half(number): return 1\n\ndef double(number): return 1\n```", "31"):
        assert is_right(item, wrong, SANDBOX) is False


def test_code_is_taken_from_its_fences(tmp_path: Path) -> None:
    item = read(tmp_path, "humaneval", [HUMANEVAL], format="chat")[0]
    code = "def half(number):\n    return math.floor(number / 2)"  # the question has imported math
    for answer in (f"Sure:\n```python\n{code}\n```\nIt halves.", f"```\n{code}\n```", f"```py\n{code}", code):
        assert is_right(item, answer, SANDBOX)


def test_of_a_chat_nobody_knows_what_is_right(tmp_path: Path) -> None:
    assert is_right(read(tmp_path, "mt_bench", [MT_BENCH])[0], "An answer.", SANDBOX) is None


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 2), (4, 4, 4), (6, 5, 2)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n: int, c: int, k: int) -> None:
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_needs_as_many_samples() -> None:
    with pytest.raises(ValueError, match="expected at least 1 and at most 3 samples, got 4"):
        pass_at_k(3, 1, 4)


def test_agreement_counts_places() -> None:
    assert agreement([1, 2, 3], [1, 2, 3]) == agreement([], []) == 1
    assert agreement([1, 2, 3, 4], [1, 9, 3]) == 0.5
    assert agreement([1, 2], []) == 0


def _common(one: list[int], other: list[int]) -> int:
    """The longest common subsequence, by trying all."""
    for length in range(len(one), 0, -1):
        parts = set(itertools.combinations(other, length))
        if any(part in parts for part in itertools.combinations(one, length)):
            return length
    return 0


def test_overlap_is_that_of_the_longest_common_subsequence() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        sizes = torch.randint(1, 8, (2,), generator=generator).tolist()
        one, other = (torch.randint(0, 4, (size,), generator=generator).tolist() for size in sizes)
        assert overlap(one, other) == pytest.approx(2 * _common(one, other) / (len(one) + len(other)))
    assert overlap([], []) == 1
    assert overlap([1], []) == 0


def test_perplexity_is_the_inverse_of_the_mean_probability(target_folder: str) -> None:
    backend = HuggingFaceBackend(target_folder)
    assert perplexity(backend, [1, 2], []) == 1
    said = [1, 0, 2]
    surprise = 0.0
    for place, token in enumerate(said):
        [logits] = backend.logits([Row("one", [1, 2, *said[:place]], 1)])
        surprise -= float(torch.log_softmax(logits.float(), -1)[token])
    assert perplexity(backend, [1, 2], said) == pytest.approx(math.exp(surprise / 3), rel=1e-5)
