"""One pair in, tokens per second with the draft in this process and in another one out.

Target and draft can be pinned to a core each, as if each had a device of its own: a draft in this process then shares the
target's, and one in another process works beside it. All arms answer the same prompts in turns.
"""

import asyncio
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from specdecode.backends.backend import ModelBackend, create_backend
from specdecode.config import StrictModel
from specdecode.decoding.drafters import Drafter, ModelDrafter, NoDrafter
from specdecode.decoding.loop import as_drafter, generate
from specdecode.decoding.metrics import DecodingMetrics
from specdecode.decoding.sequence import Route, SamplingParams, Sequence, VerifierName
from specdecode.exchange.channel import TcpChannel
from specdecode.exchange.listener import Listener
from specdecode.exchange.messages import ModelTokens
from specdecode.exchange.remote import RemoteDrafter
from specdecode.exchange.scheduler import DraftScheduler, SchedulerConfig

Arm = Literal["plain", "local", "remote", "run ahead"]
ARMS: tuple[Arm, ...] = ("plain", "local", "remote", "run ahead")


class RemoteConfig(StrictModel):
    """What `specdecode remote` compares."""

    target: str = Field(default="tiny/target", description="the target model, such as one made by `specdecode synthetic`")
    draft: str = Field(default="tiny/draft-generic", description="the draft model")
    arms: list[Arm] = Field(default=list(ARMS), min_length=1)
    batches: list[int] = Field(default=[1, 16], min_length=1, description="how many sequences are decoded together")
    K: int = Field(default=4, gt=0, description="tokens drafted in a round")
    temperature: float = Field(default=0.0, ge=0)
    verifier: VerifierName = "rejection"
    prompt_length: int = Field(default=32, gt=0, description="tokens of each prompt, drawn at random")
    max_tokens: int = Field(default=96, gt=1)
    num_repeats: int = Field(default=3, gt=0)
    target_core: int | None = Field(default=None, ge=0, description="the core that target and local draft are pinned to")
    draft_core: int | None = Field(
        default=None, ge=0, description="the core that the draft in a process of its own is pinned to"
    )
    num_threads: int = Field(default=1, gt=0, description="CPU threads of each model")


@dataclass(frozen=True)
class RemoteRecord:
    """One batch that was decoded: how, what came out, and what it took.

    `num_ahead` of the drafted tokens were there before they were asked for; `exchange_ms` is the median of what a round's
    exchange took beside the draft model's work.
    """

    arm: Arm
    batch: int
    tokens: list[list[int]]
    metrics: DecodingMetrics
    num_rounds: int
    num_ahead: int
    exchange_ms: float


def measure_remote(config: RemoteConfig) -> Iterator[RemoteRecord]:
    """Yields a record for every repetition, batch and arm; each batch size's first repetition is preceded by a warm-up."""
    with ExitStack() as stack:
        stack.enter_context(_pinned(config.target_core, config.num_threads))
        target = create_backend(config.target)
        drafters = {arm: _drafter(arm, config, target, stack) for arm in config.arms}
        for batch in config.batches:
            for repeat in range(-1, config.num_repeats):
                for arm, drafter in drafters.items():
                    record = _decode(arm, drafter, target, config, batch, repeat)
                    if repeat >= 0:
                        yield record


def _decode(arm: Arm, drafter: Drafter, target: ModelBackend, config: RemoteConfig, batch: int, repeat: int) -> RemoteRecord:
    rng = np.random.default_rng(repeat + 1)
    sequences = []
    for number in range(batch):
        params = SamplingParams(
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            ignore_eos=True,
            seed=batch * (repeat + 1) + number,
            verifier=config.verifier,
        )
        prompt = rng.integers(0, target.vocab_size, config.prompt_length).tolist()
        sequences.append(Sequence(prompt, params, Route(arm, config.K)))
    metrics, exchange_s, num_ahead = DecodingMetrics(), [], _num_ahead(drafter)
    started = time.perf_counter()
    for rounds in generate(sequences, drafter, target):
        for _, round in rounds:
            metrics.add(round, time.perf_counter() - started)
        if isinstance(drafter, RemoteDrafter):
            exchange_s.append(drafter.metrics.last_exchange_s)
    return RemoteRecord(
        arm,
        batch,
        [sequence.tokens[config.prompt_length :] for sequence in sequences],
        metrics,
        max(1, metrics.num_target_passes // batch),
        _num_ahead(drafter) - num_ahead,
        1000 * float(np.median(exchange_s)) if exchange_s else 0.0,
    )


def _num_ahead(drafter: Drafter) -> int:
    return drafter.metrics.num_ahead if isinstance(drafter, RemoteDrafter) else 0


@dataclass(frozen=True)
class RemoteRow:
    """One arm at one batch size: sums over its records, divided once; `wait_ms` and `verify_ms` are per round."""

    arm: Arm
    batch: int
    tokens_per_second: float
    to_local: float
    acceptance_rate: float
    wait_ms: float
    verify_ms: float
    exchange_ms: float
    ahead_rate: float
    num_different: int


def summarise(records: list[RemoteRecord], temperature: float) -> list[RemoteRow]:
    """Compares the arms with the local draft; `num_different` counts greedy answers that are not those of the first arm."""
    groups: dict[tuple[int, Arm], list[RemoteRecord]] = {}
    for record in records:
        groups.setdefault((record.batch, record.arm), []).append(record)
    rates = {
        key: sum(r.metrics.num_generated for r in group) / sum(r.metrics.total_time_s for r in group)
        for key, group in groups.items()
    }
    rows = []
    for (batch, arm), group in groups.items():
        passes = sum(r.metrics.num_target_passes for r in group)
        drafted = sum(r.metrics.num_drafted for r in group)
        first = groups[batch, next(a for b, a in groups if b == batch)]
        pairs = [pair for one, other in zip(group, first, strict=True) for pair in zip(one.tokens, other.tokens, strict=True)]
        rows.append(
            RemoteRow(
                arm,
                batch,
                rates[batch, arm],
                rates[batch, arm] / rates.get((batch, "local"), float("nan")),
                sum(r.metrics.num_accepted for r in group) / max(1, drafted),
                1000 * sum(r.metrics.draft_time_s for r in group) / passes,
                1000 * sum(r.metrics.verify_time_s for r in group) / passes,
                float(np.median([r.exchange_ms for r in group])),
                sum(r.num_ahead for r in group) / max(1, drafted),
                0 if temperature else sum(one != other for one, other in pairs),
            )
        )
    return rows


def _drafter(arm: Arm, config: RemoteConfig, target: ModelBackend, stack: ExitStack) -> Drafter:
    if arm == "plain":
        return NoDrafter()
    if arm == "local":
        return as_drafter(create_backend(config.draft), target)
    return stack.enter_context(draft_process(config, ModelTokens.of(target), run_ahead=arm == "run ahead"))


@contextmanager
def _pinned(core: int | None, num_threads: int) -> Iterator[None]:
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


@contextmanager
def draft_process(config: RemoteConfig, target: ModelTokens, *, run_ahead: bool) -> Iterator[RemoteDrafter]:
    """A draft in a process of its own on this machine, and the drafter that is connected to it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve_draft, args=(there, config, run_ahead), daemon=True)
    process.start()
    there.close()
    drafter = RemoteDrafter(f"{config.draft}, run ahead {run_ahead}", target.vocab_size, deadline_s=60.0)
    try:
        address, key = here.recv()
        drafter.connect(TcpChannel.connect(address, key, target, timeout_s=30.0))
        yield drafter
    finally:
        drafter.disconnect()
        here.close()  # upon which the process ends
        process.join()


def _serve_draft(pipe: Connection, config: RemoteConfig, run_ahead: bool) -> None:
    with _pinned(config.draft_core, config.num_threads):
        backend = create_backend(config.draft)
        listener = Listener(DraftScheduler(partial(ModelDrafter.between, backend), SchedulerConfig(run_ahead=run_ahead)))

        async def hold() -> None:
            async with listener.admit() as ticket:
                pipe.send((listener.listen("127.0.0.1"), ticket.key))
                await asyncio.wrap_future(ticket.ended)

        asyncio.run(hold())
        listener.close()
