"""Drafts are compared on held-out prompts: one that is its own target is always right."""

import math
from pathlib import Path

import pytest

from jobs.compare_drafts import as_table
from specdecode.training.comparison import ComparisonConfig, as_markdown, compare
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
        for scores in (row.text, row.sampled, row.greedy):
            assert scores.acceptance == pytest.approx(1)
            assert scores.agreement == 1
        assert row.text.loss == pytest.approx(math.log(320), rel=0.05)  # of a model that knows nothing of 320 tokens
        assert row.greedy.greedy.rate == 1
        assert row.speed_up is not None
        assert row.speed_up > 0
    assert len(as_markdown(rows).splitlines()) == 2 + len(rows)
    assert "embedded" in as_table(config, rows)


def test_speed_is_not_measured_unless_it_is_asked_for(model_folder: str, data_dir: Path) -> None:
    config = ComparisonConfig(
        target=model_folder,
        drafts={"same": model_folder},
        domains={"reasoning": DataConfig(domain="reasoning", data_dir=str(data_dir), sources={"gsm8k": 1.0})},
        num_prompts=2,
        max_new_tokens=4,
        num_timed=0,
    )
    assert [row.speed_up for row in compare(config)] == [None]
