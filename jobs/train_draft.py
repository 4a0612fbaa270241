"""Trains a draft: `python -m jobs.train_draft --config configs/tiny/distill_code.yaml [--set key=value ...]`."""

import argparse
import logging
import sys

from specdecode.config import load_config
from specdecode.errors import UserError
from specdecode.training.draft import DraftTrainingConfig, train_draft


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status: 0, or 2 for what the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train_draft", description="Distil or fine-tune a draft model.")
    parser.add_argument("--config", required=True, help="a YAML file such as configs/tiny/distill_code.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        result = train_draft(load_config(options.config, DraftTrainingConfig, options.overrides))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in result.validation_losses.items())
    print(f"best checkpoint at step {result.best_step}: validation loss {losses}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
