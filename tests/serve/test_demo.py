"""What the demo shows: the text as it comes, accepted tokens coloured, and a table that compares."""

import httpx
import pytest
from rich.console import Console

from serve.demo import ACCEPTED_STYLE, compare, comparison_table, examples, first_token_s
from serve.local import Deployment, load_deployment
from tests.serve.conftest import CONFIG, ROOT


@pytest.fixture(scope="module")
def deployment(server_url: str) -> Deployment:
    return load_deployment(ROOT / CONFIG, port=int(server_url.rpartition(":")[2]))


def test_the_demo_compares_one_prompt_of_each_domain(deployment: Deployment, http: httpx.Client) -> None:
    console = Console(record=True, width=80, force_terminal=True, color_system="standard")
    assert first_token_s(http, deployment, started=0.0) > 0
    comparisons = [compare(console, http, deployment, example) for example in examples(deployment)]
    console.print(comparison_table(comparisons))
    assert [comparison.figures["draft"] for comparison in comparisons] == ["code", "chat", "reasoning"]
    assert all(comparison.is_same_text for comparison in comparisons)
    assert all(comparison.plain_rate > 0 for comparison in comparisons)
    styled = console.export_text(styles=True, clear=False)
    assert ACCEPTED_STYLE == "bold green"
    assert "\x1b[1;32m" in styled
    _, _, shown = console.export_text().partition("Greedy decoding")
    assert max(map(len, shown.splitlines())) <= 80
    for heading in ("prompt", "draft", "acceptance", "speed-up"):
        assert heading in shown
