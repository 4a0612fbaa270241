"""Prompts in, one record per generation out; records in, a table out.

Every draft, and decoding without one, answers the same prompts in turns, so that a drift of the machine meets all alike.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field

from specdecode.backends.backend import ModelBackend, create_backend
from specdecode.config import StrictModel
from specdecode.decoding.control import AdaptiveLength, FixedLength, LengthPolicy
from specdecode.decoding.drafters import Drafter
from specdecode.decoding.loop import as_drafter, generate
from specdecode.decoding.metrics import DecodingMetrics
from specdecode.decoding.sequence import Route, SamplingParams, Sequence, VerifierName
from specdecode.evaluation.prompts import DOMAINS, load_prompts
from specdecode.text import Tokenizer

PLAIN = "none"


class SpeedConfig(StrictModel):
    """What `specdecode benchmark` compares."""

    target: str = Field(description="the target model")
    drafts: dict[str, str] = Field(description="the draft models by name")
    domains: list[str] = Field(default=list(DOMAINS), description="whose built-in prompts to use")
    num_prompts: int = Field(default=8, gt=0, description="prompts of each domain")
    num_repeats: int = Field(default=1, gt=0, description="how often each prompt is answered with each draft")
    K: int = Field(default=4, ge=0, description="tokens drafted in a round")
    draft_length: Literal["adaptive", "fixed"] = Field(default="fixed", description="always K, or at the most K as many as pay")
    min_confidence: float = Field(default=0.0, ge=0, le=1, description="where a draft's own probability falls below, it ends")
    max_tokens: int = Field(default=64, gt=0)
    temperature: float = Field(default=0.0, ge=0)
    verifier: VerifierName = "rejection"
    dtype: str = "auto"
    device: str = "auto"
    num_threads: int | None = Field(default=None, gt=0, description="CPU threads; torch's own choice if unset")


@dataclass(frozen=True)
class SpeedRecord:
    """One generation: which prompt, which draft, what came out and what it took."""

    domain: str
    prompt_id: str
    draft: str
    tokens: tuple[int, ...]
    metrics: DecodingMetrics


def measure_speed(config: SpeedConfig) -> Iterator[SpeedRecord]:
    """Yields a record for every prompt, draft and repetition, drafts in turns; the first prompt's are preceded by a warm-up."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    tokenizer = Tokenizer(config.target)
    target = create_backend(config.target, config.dtype, config.device)
    drafters = {PLAIN: as_drafter(None, target)}
    length: LengthPolicy = AdaptiveLength() if config.draft_length == "adaptive" else FixedLength()
    for name, model in config.drafts.items():
        drafters[name] = as_drafter(
            create_backend(model, config.dtype, config.device), target, min_confidence=config.min_confidence
        )
    for domain in config.domains:
        for number, prompt in enumerate(load_prompts(domain)[: config.num_prompts]):
            tokens = prompt.encode(tokenizer)
            for repeat in range(config.num_repeats + (number == 0)):
                for name, drafter in drafters.items():
                    sequence, metrics = _decode(config, tokens, name, drafter, target, length)
                    if number > 0 or repeat > 0:
                        output = tuple(sequence.tokens[len(tokens) :])
                        yield SpeedRecord(domain, prompt.id, name, output, metrics)


def _decode(
    config: SpeedConfig, tokens: list[int], name: str, drafter: Drafter, target: ModelBackend, length: LengthPolicy
) -> tuple[Sequence, DecodingMetrics]:
    params = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, seed=0, verifier=config.verifier)
    sequence = Sequence(list(tokens), params, Route(name, config.K))
    metrics, started = DecodingMetrics(), time.perf_counter()
    for rounds in generate([sequence], drafter, target, length):
        metrics.add(rounds[0][1], time.perf_counter() - started)
    return sequence, metrics


@dataclass(frozen=True)
class SpeedRow:
    """What one draft did on one domain: sums over its records, divided once."""

    domain: str
    draft: str
    acceptance_rate: float
    tokens_per_target_pass: float
    tokens_per_second: float
    speed_up: float
    draft_ms: float
    verify_ms: float
    num_different: int


def summarise(records: list[SpeedRecord]) -> list[SpeedRow]:
    """Compares every draft with plain decoding on the same prompts.

    `draft_ms` and `verify_ms` are per round; `num_different` counts answers that are not the plain ones, which must be 0 when
    decoding is greedy.
    """
    plain = {(record.domain, record.prompt_id): record.tokens for record in records if record.draft == PLAIN}
    groups: dict[tuple[str, str], list[SpeedRecord]] = {}
    for record in records:
        groups.setdefault((record.domain, record.draft), []).append(record)
    rates = {key: _total(group, "num_generated") / _total(group, "total_time_s") for key, group in groups.items()}
    return [
        SpeedRow(
            domain=domain,
            draft=draft,
            acceptance_rate=_total(group, "num_accepted") / max(1, _total(group, "num_drafted")),
            tokens_per_target_pass=_total(group, "num_generated") / _total(group, "num_target_passes"),
            tokens_per_second=rates[domain, draft],
            speed_up=rates[domain, draft] / rates[domain, PLAIN],
            draft_ms=1000 * _total(group, "draft_time_s") / _total(group, "num_target_passes"),
            verify_ms=1000 * _total(group, "verify_time_s") / _total(group, "num_target_passes"),
            num_different=sum(record.tokens != plain[record.domain, record.prompt_id] for record in group),
        )
        for (domain, draft), group in groups.items()
    ]


def _total(records: list[SpeedRecord], name: str) -> Any:
    return sum(getattr(record.metrics, name) for record in records)
