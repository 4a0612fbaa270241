"""A finished run in, a file that says how it came about out."""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from specdecode.config import StrictModel
from specdecode.training.trainer import TrainingResult


def write_run(output_dir: Path, config: StrictModel, result: TrainingResult) -> None:
    """Writes OUTPUT_DIR/run.json: the configuration, what the training took and reached, and the versions it ran on."""
    run = {
        "config": config.model_dump(),
        "result": asdict(result),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (output_dir / "run.json").write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
