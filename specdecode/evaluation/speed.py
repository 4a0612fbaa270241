"""Prompts in, one record per generation out; records in, a table out.

Every draft, and decoding without one, answers the same prompts in turns, so that a drift of the machine meets all alike.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
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
    verifiers: list[VerifierName] = Field(default=["rejection"], min_length=1, description="each is tried with every draft")
    dtype: str = "auto"
    device: str = "auto"
    num_threads: int | None = Field(default=None, gt=0, description="CPU threads; torch's own choice if unset")


@dataclass(frozen=True)
class SpeedRecord:
    """One generation: which prompt, which draft, what came out and what it took."""

    domain: str
    prompt_id: str
    draft: str
    verifier: VerifierName
    tokens: tuple[int, ...]
    metrics: DecodingMetrics


def measure_speed(config: SpeedConfig) -> Iterator[SpeedRecord]:
    """Yields a record for every prompt, draft and repetition, drafts in turns; the first prompt's are preceded by a warm-up."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    tokenizer = Tokenizer(config.target)
    target = create_backend(config.target, config.dtype, config.device)
    arms: dict[tuple[str, VerifierName], Drafter] = {(PLAIN, config.verifiers[0]): as_drafter(None, target)}
    length: LengthPolicy = AdaptiveLength() if config.draft_length == "adaptive" else FixedLength()
    for name, model in config.drafts.items():
        draft = create_backend(model, config.dtype, config.device)
        drafter = as_drafter(draft, target, min_confidence=config.min_confidence)
        arms |= {(name, verifier): drafter for verifier in config.verifiers}
    for domain in config.domains:
        for number, prompt in enumerate(load_prompts(domain)[: config.num_prompts]):
            tokens = prompt.encode(tokenizer)
            for repeat in range(config.num_repeats + (number == 0)):
                for (name, verifier), drafter in arms.items():
                    params = SamplingParams(
                        temperature=config.temperature, max_tokens=config.max_tokens, seed=repeat, verifier=verifier
                    )
                    sequence = Sequence(tokens, params, Route(name, config.K))
                    metrics = _decode(sequence, drafter, target, length)
                    if number > 0 or repeat > 0:
                        output = tuple(sequence.tokens[len(tokens) :])
                        yield SpeedRecord(domain, prompt.id, name, verifier, output, metrics)


def _decode(sequence: Sequence, drafter: Drafter, target: ModelBackend, length: LengthPolicy) -> DecodingMetrics:
    metrics, started = DecodingMetrics(), time.perf_counter()
    for rounds in generate([sequence], drafter, target, length):
        metrics.add(rounds[0][1], time.perf_counter() - started)
    return metrics


@dataclass(frozen=True)
class SpeedRow:
    """What one draft did on one domain: sums over its records, divided once."""

    domain: str
    draft: str
    verifier: VerifierName
    acceptance_rate: float
    tokens_per_draft: float
    tokens_per_draft_error: float
    tokens_per_target_pass: float
    tokens_per_second: float
    speed_up: float
    draft_ms: float
    verify_ms: float
    num_different: int


def summarise(records: list[SpeedRecord]) -> list[SpeedRow]:
    """Compares every draft with plain decoding on the same prompts.

    `tokens_per_draft` is how many tokens a round with a draft yields, and its error half of the 95% interval, from resampled
    generations; `draft_ms` and `verify_ms` are per round; `num_different` counts answers that are not the plain ones, which
    must be 0 when decoding is greedy.
    """
    plain = {(record.domain, record.prompt_id): record.tokens for record in records if record.draft == PLAIN}
    groups: dict[tuple[str, str, VerifierName], list[SpeedRecord]] = {}
    for record in records:
        groups.setdefault((record.domain, record.draft, record.verifier), []).append(record)
    rates = {key: _total(group, "num_generated") / _total(group, "total_time_s") for key, group in groups.items()}
    plain_rates = {domain: rate for (domain, draft, _), rate in rates.items() if draft == PLAIN}
    return [
        SpeedRow(
            domain=domain,
            draft=draft,
            verifier=verifier,
            acceptance_rate=_total(group, "num_accepted") / max(1, _total(group, "num_drafted")),
            tokens_per_draft=_tokens_per_draft(group),
            tokens_per_draft_error=_error(group),
            tokens_per_target_pass=_total(group, "num_generated") / _total(group, "num_target_passes"),
            tokens_per_second=rates[domain, draft, verifier],
            speed_up=rates[domain, draft, verifier] / plain_rates[domain],
            draft_ms=1000 * _total(group, "draft_time_s") / _total(group, "num_target_passes"),
            verify_ms=1000 * _total(group, "verify_time_s") / _total(group, "num_target_passes"),
            num_different=sum(record.tokens != plain[record.domain, record.prompt_id] for record in group),
        )
        for (domain, draft, verifier), group in groups.items()
    ]


def _tokens_per_draft(records: list[SpeedRecord]) -> float:
    return 1 + _total(records, "num_accepted") / max(1, _total(records, "num_drafts"))


def _error(records: list[SpeedRecord]) -> float:
    """Half of the 95% bootstrap interval of the tokens per draft, over generations."""
    accepted, drafts = (np.array([getattr(r.metrics, name) for r in records]) for name in ("num_accepted", "num_drafts"))
    samples = np.random.default_rng(0).integers(len(records), size=(2000, len(records)))
    ratios = accepted[samples].sum(1) / np.maximum(1, drafts[samples].sum(1))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(high - low) / 2


def _total(records: list[SpeedRecord], name: str) -> Any:
    return sum(getattr(record.metrics, name) for record in records)
