"""The command line: arguments in, one call out; each command is in `specdecode.commands`."""

import argparse
import sys
from collections.abc import Sequence as Arguments

from specdecode.commands import benchmark, generate, measure, models, profile, serve
from specdecode.errors import UserError

_COMMANDS = (
    generate.add_generate,
    serve.add_serve,
    serve.add_demo,
    serve.add_config,
    benchmark.add_benchmark,
    benchmark.add_report,
    benchmark.add_compare,
    profile.add_profile,
    measure.add_overhead,
    measure.add_exchange,
    measure.add_remote,
    measure.add_http,
    measure.add_routing,
    models.add_synthetic,
    models.add_push,
)


def main(arguments: Arguments[str] | None = None) -> int:
    """Runs one command and returns the exit status: 2 for what the user can fix, said in one line."""
    parsed = parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except UserError as error:
        print(f"specdecode: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    whole = argparse.ArgumentParser(prog="specdecode", description="Lossless speculative decoding with several drafts.")
    commands = whole.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in _COMMANDS:
        add(commands)
    return whole


if __name__ == "__main__":
    sys.exit(main())
