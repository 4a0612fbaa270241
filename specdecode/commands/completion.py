"""`specdecode completion`: a shell's name in, what teaches it the commands and options out."""

import argparse

from specdecode.commands.options import Commands, add_command

_FILES = ("config", "file")
_FOLDERS = ("folder", "before", "after", "output")


def add_completion(commands: Commands, whole: argparse.ArgumentParser) -> None:
    """Adds the command; `whole` is the parser of all commands, which may be added to afterwards."""
    completion = add_command(
        commands,
        "completion",
        lambda parsed: _completion(whole, parsed.shell),
        "print a script that completes commands, options and files in a shell",
        "specdecode completion bash > ~/.local/share/bash-completion/completions/specdecode",
    )
    completion.add_argument("shell", choices=("bash", "zsh"))


def _completion(whole: argparse.ArgumentParser, shell: str) -> None:
    import shtab

    for parser in _parsers(whole):
        for action in parser._actions:
            if action.dest in _FILES + _FOLDERS:
                action.complete = shtab.FILE if action.dest in _FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(whole, shell))


def _parsers(whole: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser of each command."""
    [commands] = [action for action in whole._actions if isinstance(action, argparse._SubParsersAction)]
    return list(commands.choices.values())
