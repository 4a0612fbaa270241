"""Drafts are compared on held-out prompts: one that is its own target is always right."""

from pathlib import Path

import pytest

from jobs.compare_drafts import ComparisonConfig, compare
from specdecode.training.data import DataConfig


def test_a_draft_that_is_the_target_is_always_right(model_folder: str, data_dir: Path) -> None:
    config = ComparisonConfig(
        target=model_folder,
        drafts={"same": model_folder, "embedded": model_folder},
        domains={"reasoning": DataConfig(domain="reasoning", data_dir=str(data_dir), sources={"gsm8k": 1.0})},
        num_prompts=4,
        max_new_tokens=12,
        num_timed=2,
    )
    rows = list(compare(config))
    assert [(row.domain, row.draft) for row in rows] == [("reasoning", "same"), ("reasoning", "embedded")]
    for row in rows:
        assert row.sampled.acceptance == pytest.approx(1)
        assert row.greedy.agreement == 1
        assert row.greedy.greedy.rate == 1
        assert row.speed_up is not None
        assert row.speed_up > 0
