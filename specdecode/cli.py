"""The command line: arguments in, one call out; each command is in `specdecode.commands`."""

import argparse
import os
import select
import sys
from collections.abc import Sequence as Arguments
from importlib.metadata import version

from specdecode.commands import benchmark, completion, config, evaluate, generate, load, measure, models, profile, serve
from specdecode.errors import UserError

_COMMANDS = (
    generate.add_generate,
    serve.add_serve,
    serve.add_demo,
    config.add_config,
    benchmark.add_benchmark,
    benchmark.add_report,
    benchmark.add_compare,
    evaluate.add_evaluate,
    profile.add_profile,
    load.add_load,
    measure.add_overhead,
    measure.add_exchange,
    measure.add_remote,
    measure.add_http,
    measure.add_routing,
    models.add_models,
    models.add_synthetic,
    models.add_push,
)

_STATUSES = """\
exit status:
  0    done
  1    stopped by an error that is not yours to fix, which is shown whole; or nobody read the output to its end
  2    something to fix, said in one line: an option, a file, a model's name
  130  interrupted by Ctrl-C, with nothing left running

specdecode COMMAND --help shows a command's options and an example.
"""


def main(arguments: Arguments[str] | None = None) -> int:
    """Runs one command and returns the exit status: 2 for what the user can fix, said in one line."""
    parsed = parser().parse_args(arguments)
    try:
        parsed.run(parsed)
        sys.stdout.flush()
    except UserError as error:
        print(f"specdecode: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _is_output_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    whole = argparse.ArgumentParser(
        prog="specdecode",
        description="Lossless speculative decoding with several drafts.",
        epilog=_STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"specdecode {version('specdecode')}")
    commands = whole.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in _COMMANDS:
        add(commands)
    completion.add_completion(commands, whole)
    return whole


def _is_output_closed() -> bool:
    """Whether nobody reads what is printed any more, as after `| head`."""
    watch = select.poll()
    watch.register(sys.stdout, 0)  # errors alone
    return bool(watch.poll(0))


if __name__ == "__main__":
    sys.exit(main())
