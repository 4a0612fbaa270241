"""What happens in, Ray's metrics out: on the dashboard and for Prometheus, named as vLLM names them where it has one.

To report a number to Ray takes tens of microseconds, and a round must not wait for it. So numbers are collected where they
arise, on any thread, and handed over once a second.
"""

import asyncio
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from serve.schema import NO_DRAFT
from specdecode.decoding.engine import Engine
from specdecode.decoding.metrics import DecodingMetrics
from specdecode.decoding.sequence import Round, Sequence
from specdecode.exchange.remote import RemoteDrafter

if TYPE_CHECKING:  # whose requests are counted here, and who does so; Ray is not needed to collect
    from ray.serve import metrics

    from serve.access import Access

_NO_DOMAIN = "none"  # as long as nothing tells domains apart
METRICS_PERIOD_S = 1.0
_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
_FINE_SECONDS = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0]


@dataclass(frozen=True)
class Metric:
    """What a metric is; Ray Serve adds the deployment, the replica and the application to its labels."""

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


def _histogram(description: str, boundaries: list[float], *labels: str) -> Metric:
    return Metric("histogram", description, labels, tuple(boundaries))


METRICS: Mapping[str, Metric] = {
    "specdecode_spec_decode_num_drafts": Metric("counter", "rounds of a sequence with a draft", ("draft", "domain")),
    "specdecode_spec_decode_num_draft_tokens": Metric("counter", "drafted tokens", ("draft", "domain")),
    "specdecode_spec_decode_num_accepted_tokens": Metric("counter", "accepted drafted tokens", ("draft", "domain")),
    "specdecode_spec_decode_num_accepted_tokens_per_pos": Metric(
        "counter", "accepted drafted tokens by their place in the draft, from 0", ("draft", "domain", "position")
    ),
    "specdecode_prompt_tokens": Metric("counter", "tokens of prompts"),
    "specdecode_generation_tokens": Metric("counter", "generated tokens", ("draft", "domain")),
    "specdecode_target_passes": Metric("counter", "rounds of a sequence, with a draft or without", ("draft", "domain")),
    "specdecode_request_success": Metric("counter", "generations that came to their end", ("finished_reason",)),
    "specdecode_request_errors": Metric("counter", "requests that were answered with an error", ("code",)),
    "specdecode_request_resumptions": Metric("counter", "generations that were taken up on another replica"),
    "specdecode_draft_fallbacks": Metric(
        "counter", "rounds of a sequence that had to do without their draft", ("draft", "cause")
    ),
    "specdecode_routing_choices": Metric("counter", "generations by the draft that was chosen", ("draft", "domain")),
    "specdecode_routing_seconds": _histogram("from a prompt to what is expected of each draft", _FINE_SECONDS),
    "specdecode_run_ahead_tokens": Metric("counter", "tokens drafted before they were asked for", ("draft",)),
    "specdecode_run_ahead_used_tokens": Metric("counter", "those of them that were asked for", ("draft",)),
    "specdecode_num_requests_running": Metric("gauge", "sequences that are decoded"),
    "specdecode_num_requests_waiting": Metric("gauge", "sequences that wait for a place"),
    "specdecode_kv_rows_used": Metric("gauge", "rows of the key-value cache that are in use"),
    "specdecode_kv_rows": Metric("gauge", "rows of the key-value cache"),
    "specdecode_exchange_sessions": Metric("gauge", "targets that a draft works for", ("draft",)),
    "specdecode_time_to_first_token_seconds": _histogram("from a request to its first token", _SECONDS),
    "specdecode_time_per_output_token_seconds": _histogram("from token to token, on average over an answer", _SECONDS),
    "specdecode_e2e_request_latency_seconds": _histogram("from a request to its end", _SECONDS),
    "specdecode_round_draft_seconds": _histogram("time a round waits for its drafts", _FINE_SECONDS, "draft"),
    "specdecode_round_verify_seconds": _histogram("time a round scores and accepts", _FINE_SECONDS),
    "specdecode_batch_size": _histogram("sequences of a round", [1, 2, 4, 8, 16, 32, 64, 128]),
    "specdecode_exchange_seconds": _histogram("time a round's exchange takes beside the draft's work", _FINE_SECONDS, "draft"),
}

_Key = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Collected:
    """Numbers on their way: what counters grew by, what histograms are to take in, and where gauges are; by name and labels."""

    sums: dict[_Key, float]
    values: dict[_Key, list[float]]
    levels: dict[_Key, float]


class Metrics:
    """Collects numbers by the names of `METRICS`, with the values of their labels in order. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._instruments: dict[str, metrics.Counter | metrics.Gauge | metrics.Histogram] = {}
        self._sums: defaultdict[_Key, float] = defaultdict(float)
        self._values: defaultdict[_Key, list[float]] = defaultdict(list)
        self._levels: dict[_Key, float] = {}

    def add(self, name: str, value: float = 1, *labels: str) -> None:
        """Adds to a counter."""
        with self._lock:
            self._sums[name, labels] += value

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Adds a value to a histogram."""
        with self._lock:
            self._values[name, labels].append(value)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Sets a gauge."""
        with self._lock:
            self._levels[name, labels] = value

    def drain(self) -> Collected:
        """Takes out what was collected since the last time."""
        with self._lock:
            collected = Collected(dict(self._sums), dict(self._values), self._levels)
            self._sums, self._values, self._levels = defaultdict(float), defaultdict(list), {}
        return collected

    def export(self, collected: Collected | None = None) -> None:
        """Hands over what was collected since the last time, here or where Ray is not."""
        collected = collected or self.drain()
        for (name, labels), value in collected.sums.items():
            if value > 0:
                self._instrument(name).inc(value, tags=_tags(name, labels))
        for (name, labels), level in collected.levels.items():
            self._instrument(name).set(level, tags=_tags(name, labels))
        for (name, labels), observed in collected.values.items():
            for value in observed:
                self._instrument(name).observe(value, tags=_tags(name, labels))

    async def keep_exporting(self) -> None:
        """Exports again and again, for ever."""
        while True:
            await asyncio.sleep(METRICS_PERIOD_S)
            self.export()

    def _instrument(self, name: str) -> "metrics.Counter | metrics.Gauge | metrics.Histogram":
        """What Ray has for the metric; made once, in the replica that uses it."""
        from ray.serve import metrics

        if name not in self._instruments:
            metric = METRICS[name]
            match metric.kind:
                case "counter":
                    self._instruments[name] = metrics.Counter(name, metric.description, metric.labels)
                case "gauge":
                    self._instruments[name] = metrics.Gauge(name, metric.description, metric.labels)
                case "histogram":
                    self._instruments[name] = metrics.Histogram(
                        name, metric.description, list(metric.boundaries), metric.labels
                    )
        return self._instruments[name]


def _tags(name: str, labels: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(METRICS[name].labels, labels, strict=True))


class TargetMetrics:
    """What a target's rounds give.

    Args:
        metrics: where it is counted.
        remote: the drafts that are elsewhere.
        num_rows: how many rows the key-value cache has.
    """

    def __init__(self, metrics: Metrics, remote: Several[RemoteDrafter], num_rows: int) -> None:
        self._metrics = metrics
        self._remote = list(remote)
        self._num_rows = num_rows
        self._seen: Counter[tuple[str, str]] = Counter()  # by draft: answered rounds, and fallbacks of each cause

    def observe(self, engine: Engine, rounds: list[tuple[Sequence, Round]]) -> None:
        """Counts a round of the engine, on its thread."""
        add, observe, set_ = self._metrics.add, self._metrics.observe, self._metrics.set
        set_("specdecode_num_requests_running", engine.num_running)
        set_("specdecode_num_requests_waiting", engine.num_queued)
        set_("specdecode_kv_rows_used", engine.num_running)
        set_("specdecode_kv_rows", self._num_rows)
        if not rounds:
            return
        observe("specdecode_batch_size", len(rounds))
        observe("specdecode_round_verify_seconds", rounds[0][1].verify_time_s)
        groups: defaultdict[str, DecodingMetrics] = defaultdict(DecodingMetrics)
        for sequence, round in rounds:
            groups[sequence.route.drafter or NO_DRAFT].add(round, 0.0)
        for draft, sums in groups.items():
            labels = (draft, _NO_DOMAIN)
            add("specdecode_target_passes", sums.num_target_passes, *labels)
            add("specdecode_generation_tokens", sums.num_generated, *labels)
            if sums.num_drafts:
                add("specdecode_spec_decode_num_drafts", sums.num_drafts, *labels)
                add("specdecode_spec_decode_num_draft_tokens", sums.num_drafted, *labels)
                add("specdecode_spec_decode_num_accepted_tokens", sums.num_accepted, *labels)
                observe("specdecode_round_draft_seconds", rounds[0][1].draft_time_s, draft)
            for position, count in enumerate(sums.num_accepted_at):
                add("specdecode_spec_decode_num_accepted_tokens_per_pos", count, *labels, str(position))
        for drafter in self._remote:
            self._observe_exchange(drafter)

    def _observe_exchange(self, drafter: RemoteDrafter) -> None:
        exchanged, name = drafter.metrics, drafter.name
        if exchanged.num_rounds > self._seen[name, ""]:
            self._metrics.observe("specdecode_exchange_seconds", exchanged.last_exchange_s, name)
            self._seen[name, ""] = exchanged.num_rounds
        for cause, count in exchanged.num_fallbacks.items():
            self._metrics.add("specdecode_draft_fallbacks", count - self._seen[name, cause], name, cause)
            self._seen[name, cause] = count


def count_request(metrics: Metrics, access: "Access", status: int, duration_s: float) -> None:
    """Counts a request that has ended, with what became of its generations."""
    error = access.error or (str(status) if status >= 400 else None)
    if error is not None:
        metrics.add("specdecode_request_errors", 1, error)
    if not access.choices:
        return
    metrics.observe("specdecode_e2e_request_latency_seconds", duration_s)
    for choice in access.choices:
        generation, made = choice.generation, choice.metrics
        metrics.add("specdecode_prompt_tokens", len(generation.tokens))
        metrics.add("specdecode_routing_choices", 1, generation.route.drafter or NO_DRAFT, _NO_DOMAIN)
        metrics.add("specdecode_request_resumptions", choice.num_resumptions)
        if choice.transcript.finish_reason is not None:
            metrics.add("specdecode_request_success", 1, choice.transcript.finish_reason)
        if made.num_target_passes:
            metrics.observe("specdecode_time_to_first_token_seconds", made.time_to_first_token_s)
        if made.num_generated > 1:
            rest_s = made.total_time_s - made.time_to_first_token_s
            metrics.observe("specdecode_time_per_output_token_seconds", rest_s / (made.num_generated - 1))
