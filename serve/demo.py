"""The demo: deploys, streams one prompt of each domain to the terminal, compares with plain decoding, and keeps serving."""

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from rich.box import SIMPLE
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from serve.answer import text_of
from serve.local import Deployment, deployed, load_deployment, wait_for_signal
from serve.schema import NO_DRAFT

ACCEPTED_STYLE = "bold green"
MAX_TOKENS = 96
NUM_REPEATS = 3


@dataclass(frozen=True)
class Example:
    """A prompt to show.

    Attributes:
        title: what kind of prompt it is.
        draft: the draft that suits it.
        path: the endpoint.
        prompt: the part of the request's body that holds the prompt.
        shown: the prompt as it is shown.
    """

    title: str
    draft: str
    path: str
    prompt: dict[str, Any]
    shown: str


@dataclass(frozen=True)
class Comparison:
    """One row of the table; rates are tokens per second as the client sees them."""

    title: str
    figures: dict[str, Any]
    speculative_rate: float
    plain_rate: float
    is_same_text: bool


def run_demo(config: str, port: int | None, *, stay: bool) -> None:
    """Deploys the file `config`, shows the examples and a table, and with `stay` keeps serving until Ctrl-C."""
    console = Console(highlight=False)
    deployment = load_deployment(config, port)
    console.print(f"Starting Ray and deploying {config} ...", style="dim")
    started = time.perf_counter()
    with deployed(deployment, quiet=True) as dashboard:
        client = httpx.Client(base_url=deployment.url, timeout=120)
        console.print(f"First token {first_token_s(client, deployment, started):.1f} s after that.", style="dim")
        comparisons = [compare(console, client, deployment, example) for example in examples(deployment)]
        console.print(comparison_table(comparisons))
        console.print(f"endpoint   {deployment.url}/v1   (model {deployment.config.model_name!r}, any OpenAI client)")
        console.print(f"dashboard  {dashboard}")
        if stay:
            page = f"{deployment.url}/demo" if deployment.config.router.demo else f"none: router.demo is not set in {config}"
            console.print(f"page       {page}")
            console.print("Serving until Ctrl-C.", style="dim")
            wait_for_signal()


def examples(deployment: Deployment) -> list[Example]:
    """One prompt for each domain, with the draft of that name if there is one."""
    code = 'def read_lines(path):\n    """Return the lines of a text file as a list of strings."""\n'
    chat = "Can I order a large latte with oat milk please?"
    maths = "Tom has 12 apples. He buys 3 bags with 5 apples each and gives 7 apples to Ann. How many apples does Tom have now?"
    drafts, default = deployment.config.drafts, deployment.config.default_draft or NO_DRAFT

    def suited(name: str) -> str:
        return name if name in drafts else default

    def message(text: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}]}

    return [
        Example("code", suited("code"), "/v1/completions", {"prompt": code}, code),
        Example("chat", suited("chat"), "/v1/chat/completions", message(chat), chat + "\n"),
        Example("maths", suited("reasoning"), "/v1/chat/completions", message(maths), maths + "\n"),
    ]


def compare(console: Console, client: httpx.Client, deployment: Deployment, example: Example) -> Comparison:
    """Streams the answer to the console, then times it with speculation and without, in turns."""
    console.print(Rule(f"{example.title}, draft {example.draft}", style="dim"))
    console.print(Text(example.shown, style="dim"), end="")
    answer = ""
    figures: dict[str, Any] = {}
    for chunk in _stream(client, deployment, example, example.draft):
        text = text_of(chunk)
        answer += text
        figures.update(chunk.get("speculative_decoding", {}))
        accepted = chunk.get("speculative_decoding", {}).get("round", {}).get("accepted_text", "")
        console.print(Text(accepted, style=ACCEPTED_STYLE) + Text(text[len(accepted) :]), end="", soft_wrap=True)
    console.print()
    rates: dict[str, list[float]] = {example.draft: [], NO_DRAFT: []}
    texts = {answer}
    for _ in range(NUM_REPEATS):
        for draft in rates:
            text, rate = _time(client, deployment, example, draft)
            texts.add(text)
            rates[draft].append(rate)
    medians = {draft: statistics.median(values) for draft, values in rates.items()}
    return Comparison(example.title, figures, medians[example.draft], medians[NO_DRAFT], len(texts) == 1)


def first_token_s(client: httpx.Client, deployment: Deployment, started: float) -> float:
    """Asks for an answer, and says how long after `started` its first text was there; also warms every model up."""
    first_s: list[float] = []
    for example in examples(deployment):
        for draft in (example.draft, NO_DRAFT):
            for chunk in _stream(client, deployment, example, draft):
                if text_of(chunk) and not first_s:
                    first_s.append(time.perf_counter() - started)
    return first_s[0]


def _time(client: httpx.Client, deployment: Deployment, example: Example, draft: str) -> tuple[str, float]:
    """Streams an answer without showing it; returns its text, and generated tokens over wall time."""
    started = time.perf_counter()
    chunks = list(_stream(client, deployment, example, draft))
    elapsed_s = time.perf_counter() - started
    return "".join(map(text_of, chunks)), chunks[-1]["usage"]["completion_tokens"] / elapsed_s


def _stream(client: httpx.Client, deployment: Deployment, example: Example, draft: str) -> Iterator[dict[str, Any]]:
    body = {
        "model": deployment.config.model_name,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        "speculative_decoding": {"draft": draft, "rounds": True},
        **example.prompt,
    }
    with client.stream("POST", example.path, json=body) as response:
        if response.is_error:
            raise RuntimeError(f"{response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def comparison_table(comparisons: list[Comparison]) -> Table:
    table = Table(
        title="Greedy decoding with speculation and without", caption="green above: accepted draft tokens", box=SIMPLE
    )
    for heading in ("prompt", "draft"):
        table.add_column(heading, no_wrap=True)
    for heading in ("acceptance", "tokens/\npass", "tok/s", "tok/s\nplain", "speed-up", "same\ntext"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparisons:
        table.add_row(
            row.title,
            row.figures["draft"] or NO_DRAFT,
            f"{row.figures['acceptance_rate']:.2f}",
            f"{row.figures['tokens_per_target_pass']:.2f}",
            f"{row.speculative_rate:.0f}",
            f"{row.plain_rate:.0f}",
            f"{row.speculative_rate / row.plain_rate:.2f}x",
            "yes" if row.is_same_text else "NO",
        )
    return table
