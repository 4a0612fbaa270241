"""Distils a draft of the embedded family on a few lines of text, and decodes with it: a few minutes on two cores.

usage: python docs/examples/train_and_use.py [FOLDER] [STEPS]
"""

import json
import subprocess
import sys
from pathlib import Path


def main(folder: str = "checkpoints/example", steps: str = "20") -> None:
    """Writes texts, trains, and has the command line use what came of it."""
    texts = Path(folder) / "sums.jsonl"
    texts.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"question": f"{a} + 1?", "answer": f"It is {a + 1}."}) for a in range(999))
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "data.sources": "{}",
        "data.dataset_name": texts,
        "model.draft_model": "tiny/draft-generic",
        "training.num_train_steps": steps,
        "training.per_device_batch_size": 4,
        "training.validate_every": steps,
        "distillation.completions.num_prompts": 16,
        "training.output_dir": f"{folder}/draft",
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    job = [sys.executable, "-m", "jobs.train_draft", "--config", "configs/tiny/distill_reasoning.yaml", *options]
    subprocess.run(job, check=True)
    draft = ["--model", "tiny/target", "--draft", f"{folder}/draft/best", "--prompt", "2 + 2 is", "--max-tokens", "16"]
    subprocess.run([sys.executable, "-m", "specdecode.cli", "generate", *draft], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
