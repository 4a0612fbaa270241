"""A finished run in, files that say how it came about out."""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from specdecode.config import StrictModel
from specdecode.errors import ConfigError
from specdecode.training.model_card import model_card
from specdecode.training.trainer import TrainingResult

RUN = "run.json"


def write_run(output_dir: Path, config: StrictModel, result: TrainingResult) -> None:
    """Writes run.json: the configuration, what the training took and reached, and the versions it ran on.

    It is in OUTPUT_DIR, and in OUTPUT_DIR/best with a model card.
    """
    run = {
        "config": config.model_dump(),
        "result": asdict(result),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    for folder in (output_dir, output_dir / "best"):
        (folder / RUN).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    (output_dir / "best" / "README.md").write_text(model_card(output_dir.name, run), encoding="utf-8")


def read_run(folder: Path) -> dict[str, Any]:
    """What `write_run` wrote in a folder.

    Raises:
        ConfigError: nothing is there.
    """
    path = folder / RUN
    if not path.exists():
        raise ConfigError(f"{folder}: expected the model of a finished training, but there is no {RUN}")
    return dict(json.loads(path.read_text(encoding="utf-8")))
