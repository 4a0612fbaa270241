"""The example that asks a server does so, with OpenAI's own client."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "docs/examples/ask_server.py"


def test_the_example_streams_an_answer_and_says_what_was_drafted(server_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE))["main"](f"{server_url}/v1")
    *_, figures = capsys.readouterr().out.splitlines()
    assert "'draft': 'code'" in figures
