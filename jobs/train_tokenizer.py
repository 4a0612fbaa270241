"""Trains a tokenizer: `python -m jobs.train_tokenizer --config configs/tiny/tokenizer.yaml [--set key=value ...]`."""

import argparse
import sys

from specdecode.config import load_config
from specdecode.errors import UserError
from specdecode.training.tokenizer import TokenizerConfig, train_tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status: 0, or 2 for what the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train_tokenizer", description="Train a byte-level tokenizer.")
    parser.add_argument("--config", required=True, help="a YAML file such as configs/tiny/tokenizer.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    try:
        folder = train_tokenizer(load_config(options.config, TokenizerConfig, options.overrides))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"tokenizer saved in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
