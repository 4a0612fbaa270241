"""Training is measured beside transformers' own, each way in a process of its own."""

from pathlib import Path

import pytest
import yaml

from jobs.training_speed import main


def test_every_way_is_measured(model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "draft_model": model_folder,
        "target_model": model_folder,
        "num_steps": 3,
        "per_device_batch_size": 2,
        "sequence_length": 32,
        "cached_top_k": 8,
        "num_threads": 1,
        "num_repeats": 1,
    }
    path = tmp_path / "speed.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["--config", str(path)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "x " in line and "│" in line]
    names = [row.split("│")[1].strip() for row in rows]
    assert names == ["transformers alone", "fine-tuning", "distillation", "distillation from a cache"]
    assert all(float(row.split("│")[2]) > 0 for row in rows)
