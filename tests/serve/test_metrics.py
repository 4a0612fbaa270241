"""What the server counts stands on Ray's metrics endpoint, under the names that the dashboard shows."""

import asyncio
import json
import re
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.metrics import METRICS, Metrics, TargetMetrics
from specdecode.backends.table import TableModel, random_table
from specdecode.decoding.drafters import ModelDrafter, RoutedDrafter
from specdecode.decoding.engine import Engine
from specdecode.decoding.metrics import DecodingMetrics
from specdecode.decoding.sequence import Route, SamplingParams, Sequence
from specdecode.exchange.remote import RemoteDrafter
from tests.serve.conftest import Server
from tests.serve.test_failures import descendants

SAMPLE = re.compile(r"^(\w+)(\{.*\})? ([-\d.e+]+)$")


class Recorder:
    """Stands in for Ray's instruments."""

    def __init__(self, metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counted: Counter[tuple[str, tuple[tuple[str, str], ...]]] = Counter()
        self.observed: Counter[str] = Counter()
        self.levels: dict[str, float] = {}
        monkeypatch.setattr(metrics, "_instrument", self.instrument)

    def instrument(self, name: str) -> Any:
        recorder = self

        class Instrument:
            def inc(self, value: float, tags: dict[str, str]) -> None:
                recorder.counted[name, tuple(tags.items())] += int(value)

            def set(self, value: float, tags: dict[str, str]) -> None:
                assert tags.keys() == set(METRICS[name].labels)
                recorder.levels[name] = value

            def observe(self, value: float, tags: dict[str, str]) -> None:
                assert tags.keys() == set(METRICS[name].labels)
                assert value >= 0
                recorder.observed[name] += 1

        return Instrument()


def test_the_counts_are_those_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = TableModel(random_table(5, 0)), TableModel(random_table(5, 1))
    away = RemoteDrafter("away", 5, deadline_s=1.0)  # never connected
    engine = Engine(target, RoutedDrafter({"here": ModelDrafter(draft), "away": away}))
    metrics = Metrics()
    recorder = Recorder(metrics, monkeypatch)
    counts = TargetMetrics(metrics, [away], num_rows=7)
    totals, num_rounds = DecodingMetrics(), 0
    for drafter in ("here", "here", "away", None):
        engine.submit(
            Sequence([1], SamplingParams(temperature=1.0, seed=3, max_tokens=20), Route(drafter, 3 if drafter else 0))
        )
    while engine.has_work:
        rounds = engine.step()
        counts.observe(engine, rounds)
        num_rounds += bool(rounds)
        for _, round in rounds:
            totals.add(round, 0.0)
    metrics.export()
    metrics.export()  # hands nothing over twice

    def total(name: str, **labels: str) -> int:
        return sum(v for (n, tags), v in recorder.counted.items() if n == name and labels.items() <= dict(tags).items())

    assert total("specdecode_generation_tokens") == totals.num_generated == 80
    assert total("specdecode_target_passes") == totals.num_target_passes
    assert total("specdecode_spec_decode_num_drafts", draft="here") == totals.num_drafts > 0
    assert total("specdecode_spec_decode_num_draft_tokens") == totals.num_drafted
    assert total("specdecode_spec_decode_num_accepted_tokens") == totals.num_accepted
    for position, count in enumerate(totals.num_accepted_at):
        assert total("specdecode_spec_decode_num_accepted_tokens_per_pos", position=str(position)) == count
    fallbacks = total("specdecode_draft_fallbacks", draft="away", cause="absent")
    assert fallbacks == away.metrics.num_fallbacks["absent"] == total("specdecode_target_passes", draft="away") - 1 > 0
    assert recorder.observed["specdecode_batch_size"] == num_rounds
    assert recorder.levels["specdecode_kv_rows"] == 7
    assert recorder.levels["specdecode_num_requests_running"] == 0


def scrape(server: Server) -> dict[str, float]:
    """All samples of all metrics endpoints of the server's node, by name and labels."""
    found: dict[str, float] = {}
    for address in metrics_addresses(server):
        for line in httpx.get(f"http://{address}/metrics", timeout=10).text.splitlines():
            if match := SAMPLE.match(line):
                found[match[1] + (match[2] or "")] = float(match[3])
    return found


def metrics_addresses(server: Server) -> set[str]:
    """Where the server's Ray exports metrics, as it tells Prometheus."""
    for pid in descendants(server.pid):
        with suppress(FileNotFoundError):  # it may have ended in the meantime
            if match := re.search(r"--session_dir=([^\0]+)", Path(f"/proc/{pid}/cmdline").read_text()):
                targets = json.loads((Path(match[1]) / "prom_metrics_service_discovery.json").read_text())
                return {address for part in targets for address in part["targets"]}
    raise AssertionError("no raylet")


def test_the_metrics_are_on_rays_endpoint(server: Server, http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "def read_lines(path):\n", "max_tokens": 24, "temperature": 0}
    figures = http.post("/v1/completions", json=body | {"speculative_decoding": {"draft": "code"}}).json()
    assert figures["speculative_decoding"]["num_accepted_tokens"] > 0
    assert http.post("/v1/completions", json=body | {"temperature": -1}).status_code == 400
    wanted = [
        ("ray_specdecode_spec_decode_num_accepted_tokens_total", 'draft="code"'),
        ("ray_specdecode_spec_decode_num_accepted_tokens_per_pos_total", 'position="0"'),
        ("ray_specdecode_generation_tokens_total", 'deployment="Target"'),
        ("ray_specdecode_request_success_total", 'finished_reason="length"'),
        ("ray_specdecode_request_errors_total", 'code="400"'),
        ("ray_specdecode_exchange_sessions", 'draft="code"'),
        ("ray_specdecode_exchange_seconds_count", 'draft="code"'),
        ("ray_specdecode_time_to_first_token_seconds_bucket", 'deployment="Router"'),
        ("ray_specdecode_num_requests_running", 'application="specdecode"'),
    ]
    end = time.monotonic() + 60
    while True:  # Ray's agents collect every few seconds
        samples = scrape(server)
        missing = [part for part in wanted if not any(name.startswith(part[0]) and part[1] in name for name in samples)]
        if not missing:
            break
        assert time.monotonic() < end, missing
        time.sleep(1)


def test_numbers_may_come_from_any_thread() -> None:
    metrics = Metrics()

    async def add() -> None:
        await asyncio.gather(*(asyncio.to_thread(metrics.add, "specdecode_prompt_tokens", 2) for _ in range(50)))

    asyncio.run(add())
    assert metrics._sums["specdecode_prompt_tokens", ()] == 100
