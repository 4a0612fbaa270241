"""A router in, what it adds to each request out: as the served router forecasts, off the event loop and in batches.

Beside it stands the time that a target takes to the first token of the same prompts, with nothing remembered of them.
"""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field

from serve.forecaster import Forecaster, Subject
from serve.metrics import Metrics
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.config import StrictModel
from specdecode.decoding.drafters import NoDrafter
from specdecode.decoding.loop import generate
from specdecode.decoding.sequence import SamplingParams, Sequence
from specdecode.evaluation.prompts import DOMAINS, load_prompts
from specdecode.routing.router import AdaptiveRouter, RoutingConfig
from specdecode.text import Tokenizer


class RoutingSpeedConfig(StrictModel):
    """What `specdecode routing` measures."""

    routing: RoutingConfig = Field(description="the router, see routing in a Serve file")
    target: str = Field(default="tiny/target", description="the model whose first token is waited for in comparison")
    concurrency: list[int] = Field(default=[1, 32], min_length=1, description="how many requests are there at a time")
    num_requests: int = Field(default=640, gt=0, description="requests at each concurrency")
    num_threads: int | None = Field(default=None, gt=0, description="CPU threads; torch's own choice if unset")


@dataclass(frozen=True)
class RoutingSpeedRow:
    """Milliseconds that a request waits for its forecast, and for its first token without one."""

    concurrency: int
    p50_ms: float
    p99_ms: float
    ttft_p50_ms: float


def measure_routing(config: RoutingSpeedConfig) -> Iterator[RoutingSpeedRow]:
    """Yields a row for each concurrency.

    Raises:
        ModelError: the router or the target does not load.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    router = AdaptiveRouter.from_config(config.routing)
    tokenizer = Tokenizer(config.target)
    prompts = [prompt for domain in DOMAINS for prompt in load_prompts(domain)]
    ids = [prompt.encode(tokenizer) for prompt in prompts]
    subjects = [
        Subject(prompt.prompt, len(tokens), prompt.format == "chat") for prompt, tokens in zip(prompts, ids, strict=True)
    ]
    ttft_s = float(np.median(_first_tokens(config.target, ids)))
    for concurrency in config.concurrency:
        waits = asyncio.run(_waits(router, subjects, concurrency, config.num_requests))
        p50, p99 = (1000 * float(np.percentile(waits, q)) for q in (50, 99))
        yield RoutingSpeedRow(concurrency, p50, p99, 1000 * ttft_s)


def _first_tokens(target: str, prompts: list[list[int]]) -> list[float]:
    """Seconds to the first token of each prompt, one after the other."""
    backend, seconds = HuggingFaceBackend(target), []
    for number, prompt in enumerate([prompts[0], *prompts]):  # of which the first warms up
        backend.cache.clear()
        started = time.perf_counter()
        list(generate([Sequence(prompt, SamplingParams(max_tokens=1))], NoDrafter(), backend))
        if number > 0:
            seconds.append(time.perf_counter() - started)
    return seconds


async def _waits(router: AdaptiveRouter, subjects: list[Subject], concurrency: int, num_requests: int) -> list[float]:
    """Seconds that each of the requests waited, `concurrency` being there at a time."""
    forecaster = Forecaster(router, Metrics())
    await forecaster.forecast(subjects[:concurrency])  # warms up
    numbers, seconds = iter(range(num_requests)), []

    async def ask() -> None:
        for number in numbers:
            subject = subjects[number % len(subjects)]
            subject = subject._replace(text=f"{subject.text} ({concurrency}, {number})")  # none is remembered
            started = time.perf_counter()
            await forecaster.forecast([subject])
            seconds.append(time.perf_counter() - started)

    await asyncio.gather(*(ask() for _ in range(concurrency)))
    return seconds
