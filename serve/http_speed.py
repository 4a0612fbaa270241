"""One pair in, tokens per second and time to the first token over HTTP and from the bare engine out.

The application runs on Ray Serve as it would for users, and answers streams; the engine runs in this process, with the same
configuration and the same requests. Both take turns, so that a drift of the machine meets both alike.
"""

from serve.local import Deployment, deployed, load_deployment  # isort: skip  # before all else that imports Ray

import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import numpy as np
import torch
from pydantic import Field

from serve.config import DraftModelConfig, ServeConfig
from serve.decoder import model_drafter
from serve.models import part
from serve.schema import NO_DRAFT
from specdecode.backends.backend import ModelConfig, open_model
from specdecode.config import StrictModel
from specdecode.decoding.drafters import Drafter, RoutedDrafter
from specdecode.decoding.engine import Engine
from specdecode.decoding.sequence import Route, SamplingParams, Sequence
from specdecode.errors import ConfigError
from specdecode.exchange.messages import ModelTokens

Side = Literal["engine", "http"]


class HttpSpeedConfig(StrictModel):
    """What `specdecode http` compares."""

    serve: str = Field(default="configs/tiny/serve.yaml", description="a Serve config file")
    port: int | None = Field(default=None, description="the HTTP port, instead of the file's")
    draft: str = Field(default="generic", description="a local draft of that file, or none")
    K: int = Field(default=4, ge=0, description="tokens drafted in a round")
    concurrency: list[int] = Field(default=[1, 16], min_length=1)
    prompt_length: int = Field(default=32, gt=0, description="tokens of each prompt, drawn at random")
    max_tokens: int = Field(default=128, gt=1)
    num_repeats: int = Field(default=5, gt=0)
    num_threads: int = Field(default=1, gt=0, description="CPU threads of the engine, as a replica has")


@dataclass(frozen=True)
class HttpSpeedRow:
    """One side at one concurrency: medians over the repetitions; the rate is of all streams together."""

    side: Side
    concurrency: int
    tokens_per_second: float
    ttft_ms: float
    to_engine: float
    extra_ttft_ms: float


@dataclass(frozen=True)
class _Run:
    num_tokens: int
    elapsed_s: float
    ttft_s: list[float]


def measure_http(config: HttpSpeedConfig) -> Iterator[HttpSpeedRow]:
    """Yields a row for each side and concurrency."""
    torch.set_num_threads(config.num_threads)
    deployment = load_deployment(config.serve, config.port)
    serving = deployment.config
    target = open_model(part(ModelConfig, serving.target))
    drafter = _drafter(config, serving, ModelTokens.of(target))
    engine = Engine(target, drafter, serving.target.engine)
    route = Route() if config.draft == NO_DRAFT else Route(config.draft, config.K)
    with deployed(deployment, quiet=True), _client(deployment) as (client, loop):
        for concurrency in config.concurrency:
            runs: dict[Side, list[_Run]] = {"engine": [], "http": []}
            for repeat in range(-1, config.num_repeats):
                prompts = np.random.default_rng(repeat + 1).integers(
                    300, target.vocab_size, (concurrency, config.prompt_length)
                )
                pair = (
                    _run_engine(engine, prompts.tolist(), route, config),
                    loop.run_until_complete(_run_http(client, serving.model_name, prompts.tolist(), config)),
                )
                if repeat >= 0:
                    runs["engine"].append(pair[0])
                    runs["http"].append(pair[1])
            yield from _rows(concurrency, runs)


def _drafter(config: HttpSpeedConfig, serving: ServeConfig, target: ModelTokens) -> Drafter:
    if config.draft == NO_DRAFT:
        return RoutedDrafter({})
    draft = serving.drafts.get(config.draft)
    if not isinstance(draft, DraftModelConfig) or draft.is_deployed:
        raise ConfigError(f"draft: expected a local draft model of {config.serve}, or {NO_DRAFT}, got {config.draft!r}")
    return RoutedDrafter({config.draft: model_drafter(open_model(part(ModelConfig, draft)), draft, target)})


def _run_engine(engine: Engine, prompts: list[list[int]], route: Route, config: HttpSpeedConfig) -> _Run:
    params = SamplingParams(max_tokens=config.max_tokens, ignore_eos=True)
    started, first, num_tokens = time.perf_counter(), dict[str, float](), 0
    for prompt in prompts:
        engine.submit(Sequence(prompt, params, route))
    for sequence, round in engine.run():
        first.setdefault(sequence.id, time.perf_counter() - started)
        num_tokens += len(round.tokens)
    return _Run(num_tokens, time.perf_counter() - started, list(first.values()))


@contextmanager
def _client(deployment: Deployment) -> Iterator[tuple[httpx.AsyncClient, asyncio.AbstractEventLoop]]:
    """A client that keeps its connections, as those of users do, and the event loop that it needs for that."""
    loop = asyncio.new_event_loop()
    client = httpx.AsyncClient(base_url=deployment.url, timeout=120)
    try:
        yield client, loop
    finally:
        loop.run_until_complete(client.aclose())
        loop.close()


async def _run_http(client: httpx.AsyncClient, model: str, prompts: list[list[int]], config: HttpSpeedConfig) -> _Run:
    started = time.perf_counter()
    streams = await asyncio.gather(*(_stream(client, model, prompt, config, started) for prompt in prompts))
    elapsed_s = time.perf_counter() - started
    return _Run(sum(count for count, _ in streams), elapsed_s, [first for _, first in streams])


async def _stream(
    client: httpx.AsyncClient, model: str, prompt: list[int], config: HttpSpeedConfig, started: float
) -> tuple[int, float]:
    """How many tokens a stream gave, and when its first chunk was there."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": config.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "speculative_decoding": {"draft": config.draft, "K": config.K},
    }
    first, last = 0.0, ""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first, last = first or time.perf_counter() - started, line
    return json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"], first


def _rows(concurrency: int, runs: dict[Side, list[_Run]]) -> Iterator[HttpSpeedRow]:
    rates = {side: statistics.median(run.num_tokens / run.elapsed_s for run in of_side) for side, of_side in runs.items()}
    ttft_s = {side: statistics.median(first for run in of_side for first in run.ttft_s) for side, of_side in runs.items()}
    for side in runs:
        yield HttpSpeedRow(
            side,
            concurrency,
            rates[side],
            1000 * ttft_s[side],
            rates[side] / rates["engine"],
            1000 * (ttft_s[side] - ttft_s["engine"]),
        )
