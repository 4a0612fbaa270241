"""Requests arrive when they should and wait from then on; a failure is a row and no figure; mistakes are said before."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdecode.cli import main
from specdecode.config import check_config
from specdecode.errors import ConfigError
from specdecode.evaluation.datasets import Dataset, DatasetConfig
from specdecode.evaluation.endpoint import BadAnswerError, events
from specdecode.evaluation.load import ask_all, read_load, run_load
from specdecode.evaluation.load_plan import LoadConfig, Plan, arrivals
from specdecode.evaluation.load_records import LoadRecord
from tests.evaluation.endpoints import FakeEndpoint

RANDOM = {"min_tokens": 3, "max_tokens": 5, "vocab_size": 9}


def load_config(endpoint: FakeEndpoint, folder: Path, **values: Any) -> LoadConfig:
    told: dict[str, Any] = {"url": endpoint.url, "random": RANDOM, "num_turns": 2, "num_warmup": 1, "output_dir": str(folder)}
    return check_config(told | values, LoadConfig, "test")


def load(endpoint: FakeEndpoint, folder: Path, **values: Any) -> list[LoadRecord]:
    run_load(load_config(endpoint, folder, **values))
    return read_load(folder)[1]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_are_gamma_distributed_and_follow_from_the_seed(burstiness: float) -> None:
    times = arrivals(8.0, burstiness, 40_000, np.random.default_rng(0))
    assert times == arrivals(8.0, burstiness, 40_000, np.random.default_rng(0))
    gaps = np.diff([0.0, *times])
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.03)  # 1 of a Poisson process


def test_arms_are_asked_the_same_at_the_same_times_and_another_time_something_else() -> None:
    values = {"arms": {"a": {}, "b": {}}, "rates": [5.0], "dataset": {"name": "code"}, "num_requests": 50, "output_dir": "x"}
    plan = Plan(check_config(values, LoadConfig, "test"), Dataset(DatasetConfig(name="code")))
    assert plan.requests(0, "a") == plan.requests(0, "b") == plan.requests(0, "a")
    first, second = plan.requests(0, "a"), plan.requests(1, "a")
    assert [request.at_s for request in first] != [request.at_s for request in second]
    assert [request.item for request in first] != [request.item for request in second]
    assert len({request.item for request in first}) == min(50, len(Dataset(DatasetConfig(name="code"))))


def test_random_prompts_are_never_asked_again() -> None:
    values = {"arms": {"a": {}, "b": {}}, "concurrency": [2], "random": {"vocab_size": 9}, "output_dir": "x"}
    plan = Plan(check_config(values, LoadConfig, "test"), None)
    requests = [*plan.warm_up("a"), *plan.requests(0, "a"), *plan.requests(0, "b"), *plan.requests(1, "a")]
    prompts = [tuple(request.question.body["prompt"]) for request in requests]
    assert len(set(prompts)) == len(prompts) == 4 + 3 * 32
    assert {len(prompt) for prompt in prompts} == {64}
    assert {token for prompt in prompts for token in prompt} == set(range(9))


def test_a_closed_loop_has_so_many_clients_all_the_time(tmp_path: Path) -> None:
    with FakeEndpoint(first_s=0.05).serving() as endpoint:
        records = load(endpoint, tmp_path, concurrency=[3], num_requests=12)
    assert max(body["num_running"] for body in endpoint.heard) == 3
    assert len(records) == 24
    turn = [record for record in records if record.turn == 0]
    assert sum(record.latency_s for record in turn) / max(record.ended_s for record in turn) > 1.5
    assert all(record.scheduled_s == record.started_s for record in records)
    assert endpoint.num_connections <= 10  # they are used again


def test_the_times_of_an_answer_are_those_of_its_text(tmp_path: Path) -> None:
    with FakeEndpoint(first_s=0.1, gap_s=0.04, num_chunks=5, tokens_per_chunk=3).serving() as endpoint:
        records = load(endpoint, tmp_path, concurrency=[1], num_requests=2, random=None, dataset={"name": "chat"})
    assert {body["path"] for body in endpoint.heard} == {"/v1/chat/completions"}
    assert {record.num_prompt_tokens for record in records} == {7}
    for record in records:
        assert record.error is None
        assert record.ttft_s > 0.09  # the chunk with the role is no text
        assert record.latency_s > 0.1 + 4 * 0.04 - 0.01
        assert len(record.gaps_s) == 4
        assert record.num_tokens == 15
        assert record.tpot_s == pytest.approx((record.latency_s - record.ttft_s) / 14)
        assert sum(record.gaps_s) <= record.latency_s - record.ttft_s


def test_an_open_loop_counts_from_the_arrival_and_not_from_when_a_client_was_free(tmp_path: Path) -> None:
    with FakeEndpoint(first_s=0.05, at_once=1).serving() as endpoint:  # 20 answers a second, of 100 that are asked for
        options = {"rates": [100.0], "num_requests": 20, "max_concurrency": 2}
        records = load(endpoint, tmp_path, **options)
    turn = [record for record in records if record.turn == 0]
    schedule = arrivals(100.0, 1.0, 20, np.random.default_rng([0, 0, 0]))
    assert [record.scheduled_s for record in turn] == schedule
    assert max(body["num_running"] for body in endpoint.heard) == 2
    assert turn[-1].started_s - turn[-1].scheduled_s > 0.4  # while it waited for a client
    assert turn[-1].latency_s > 0.6  # 20 times 0.05 s, but for its arrival
    assert turn[-1].ttft_s > 0.6


def test_requests_of_an_open_loop_are_sent_on_time_whether_others_are_answered_or_not(tmp_path: Path) -> None:
    with FakeEndpoint(first_s=0.4).serving() as endpoint:
        load(endpoint, tmp_path, rates=[100.0], num_requests=20)
    assert max(body["num_running"] for body in endpoint.heard) > 10


def test_a_duration_ends_both_loops(tmp_path: Path) -> None:
    with FakeEndpoint(first_s=0.03).serving() as endpoint:
        records = load(endpoint, tmp_path, concurrency=[1], rates=[50.0], num_requests=1000, duration_s=0.3)
    assert 2 <= sum(record.kind == "concurrency" for record in records) <= 2 * 10
    expected = [at for part in (1, 3) for at in arrivals(50.0, 1.0, 1000, np.random.default_rng([0, part, 0])) if at < 0.3]
    assert [record.scheduled_s for record in records if record.kind == "rate"] == expected
    assert max(record.scheduled_s for record in records) < 0.3


TROUBLES = {
    "refuse": "429: The queue is full.",
    "cut": "RemoteProtocolError: peer closed connection",
    "end": "the stream ended before its end",
    "rubbish": "an event that is no JSON: {rubbish",
    "list": "an event that is no object",
    "error": "an error in the stream: {'message': 'out of memory'}",
    "uncounted": "a stream without its usage",
    "strange": "an event that is not OpenAI's: KeyError('prompt_tokens')",
    "nothing": "an answer of no tokens",
    "hang": "no end after 0.6 s",
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_failure_is_a_row_without_figures(trouble: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"concurrency": [2], "num_requests": 2, "timeout_s": 0.6 if trouble == "hang" else 9.0}
    with FakeEndpoint().serving() as endpoint:
        with pytest.raises(ConfigError) as caught:  # before the load it is a mistake
            load(endpoint, tmp_path / "before", extra_body={"trouble": trouble}, **values)
        config = load_config(endpoint, tmp_path, extra_body={"trouble": trouble}, **values)
        records = asyncio.run(_ask_all(config))
    assert str(caught.value).startswith(f"{endpoint.url} does not answer the arm endpoint: {TROUBLES[trouble]}")
    for record in records:
        assert record.error is not None
        assert record.error.startswith(TROUBLES[trouble])
        assert record == LoadRecord(
            number=record.number, scheduled_s=record.scheduled_s, started_s=record.started_s, ended_s=record.ended_s,
            error=record.error,
        )  # fmt: skip


async def _ask_all(config: LoadConfig) -> list[LoadRecord]:
    from specdecode.evaluation.endpoint import Endpoint

    async with Endpoint.open(config.url, None, None, config.extra_body, config.timeout_s) as endpoint:
        return await ask_all(endpoint, Plan(config, None).requests(0, "endpoint"), 2, None, LoadRecord())


def test_arms_differ_in_what_they_say_and_take_turns_in_being_first(tmp_path: Path) -> None:
    arms = {"plain": {"extra_body": {"a": 1}}, "other": {"extra_body": {"b": 2, "temperature": 0.5}}}
    options: dict[str, Any] = {"arms": arms, "extra_body": {"a": 0, "top_p": 0.9}, "ignore_eos": True, "max_tokens": 9}
    with FakeEndpoint().serving() as endpoint:
        records = load(endpoint, tmp_path, concurrency=[1, 2], num_requests=2, temperature=0.2, **options)
    expected = {"max_tokens": 9, "ignore_eos": True, "top_p": 0.9, "model": "fake", "stream": True}
    assert all(body.items() >= expected.items() for body in endpoint.heard)
    said = [(body["a"], body.get("b"), body["temperature"]) for body in endpoint.heard]
    assert said[:2] == [(1, None, 0.2), (0, 2, 0.5)]  # the warm-up
    order = [(record.turn, record.load, record.arm) for record in records]
    assert order[:8:2] == [(0, 1.0, "plain"), (0, 1.0, "other"), (0, 2.0, "plain"), (0, 2.0, "other")]
    assert order[8::2] == [(1, 1.0, "other"), (1, 1.0, "plain"), (1, 2.0, "other"), (1, 2.0, "plain")]


def test_two_endpoints_are_compared(tmp_path: Path) -> None:
    with FakeEndpoint(num_chunks=2).serving() as one, FakeEndpoint(models=("a", "b")).serving() as two:
        records = load(one, tmp_path, arms={"one": {}, "two": {"url": two.url, "model": "b"}}, concurrency=[1], num_requests=3)
    assert {(record.arm, record.num_tokens) for record in records} == {("one", 4), ("two", 8)}
    assert {body["model"] for body in two.heard} == {"b"}


def test_a_load_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    with FakeEndpoint().serving() as endpoint:
        before = load(endpoint, tmp_path, concurrency=[1, 2], num_requests=2)
        (tmp_path / "records" / "part-00002.parquet").unlink()
        with pytest.raises(ConfigError, match="1 of 4 parts are missing: run it again"):
            read_load(tmp_path)
        num_heard = len(endpoint.heard)
        after = load(endpoint, tmp_path, concurrency=[1, 2], num_requests=2)
        assert len(endpoint.heard) == num_heard + 1 + 2
        with pytest.raises(ConfigError, match="holds a load of another configuration: expected a new folder"):
            load(endpoint, tmp_path, concurrency=[1, 2], num_requests=3)
    assert [replace(record, started_s=0) for record in before[:4]] == [replace(record, started_s=0) for record in after[:4]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"url": "http://127.0.0.1:1/v1"}, "url: http://127.0.0.1:1/v1 cannot be reached: All connection attempts failed"),
        ({"url": "127.0.0.1:8000"}, "url: 127.0.0.1:8000 cannot be reached: Request URL is missing"),
        ({"url": "http://x:y/v1"}, "url: http://x:y/v1 cannot be reached: Invalid port"),
        ({"url": "WITHOUT"}, "url: expected an endpoint with WITHOUT/models, such as http://127.0.0.1:8000/v1, got 404"),
        ({"model": "big"}, "model: expected one of fake of HERE, got big"),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env: expected an API key in the environment variable NO_SUCH_KEY"),
        ({"random": None}, "test: top level: dataset: expected either"),
        ({"concurrency": []}, "test: top level: concurrency: expected some"),
        ({"rates": [-1.0]}, "test: top level: concurrency and rates: expected numbers above 0, got -1"),
        ({"concurrency": [4, 33]}, "test: top level: num_requests: expected at least 33, one for each client, got 32"),
        ({"goodput": {}}, "test: goodput: expected one of ttft_ms"),
        ({"random": {"min_tokens": 65}}, "test: random: max_tokens: expected at least min_tokens, 65, got 64"),
    ],
)
def test_a_mistake_is_said_in_a_line_before_the_load(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with FakeEndpoint().serving() as endpoint:
        without = endpoint.url.removesuffix("/v1")
        if values.get("url") == "WITHOUT":
            values = {"url": without}
        with pytest.raises(ConfigError) as caught:
            load(endpoint, tmp_path, **({"concurrency": [1]} | values))
    assert str(caught.value).startswith(message.replace("WITHOUT", without).replace("HERE", endpoint.url))
    assert "\n" not in str(caught.value)
    assert endpoint.heard == []


def test_an_api_key_is_sent_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "load.yaml"
    values = {"random": RANDOM, "concurrency": [1], "num_requests": 1, "num_turns": 2, "output_dir": str(tmp_path / "run")}
    config.write_text(json.dumps(values))
    command = ["load", "--config", str(config), "--url"]
    with FakeEndpoint(key="a-secret-key").serving() as endpoint:
        assert main([*command, endpoint.url]) == 2
        assert "wants an API key: set api_key_env (401: Incorrect API key provided.)" in capsys.readouterr().err
        monkeypatch.setenv("SOME_KEY", "another-secret")
        assert main([*command, endpoint.url, "--set", "api_key_env=SOME_KEY"]) == 2
        told = capsys.readouterr().err
        assert "refuses the API key in SOME_KEY" in told
        assert "secret" not in told
        monkeypatch.setenv("SOME_KEY", "a-secret-key")
        assert main([*command, endpoint.url, "--set", "api_key_env=SOME_KEY"]) == 0
    assert "secret" not in "".join(capsys.readouterr())
    assert all(b"a-secret-key" not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_load_and_report_print_the_same_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, folder = tmp_path / "load.yaml", tmp_path / "run"
    values = {"arms": {"a": {}, "b": {}}, "random": RANDOM, "concurrency": [1, 2], "rates": [50.0], "num_requests": 4}
    config.write_text(json.dumps(values | {"num_turns": 2, "goodput": {"ttft_ms": 9999.0}, "output_dir": str(folder)}))
    with FakeEndpoint().serving() as endpoint:
        assert main(["load", "--config", str(config), "--url", endpoint.url, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert [(row["kind"], row["load"], row["arm"], row["num_answers"]) for row in summary["rows"]] == [
        (kind, point, arm, 8) for kind, point in (("concurrency", 1.0), ("concurrency", 2.0), ("rate", 50.0)) for arm in "ab"
    ]
    assert all(row["goodput"] == row["requests_per_second"] for row in summary["rows"])
    assert main(["report", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    chart = (folder / "load.png").read_bytes()
    assert chart.startswith(b"\x89PNG")
    assert main(["report", str(folder), "--json"]) == 0
    assert (folder / "load.png").read_bytes() == chart
    capsys.readouterr()
    assert sum("closed loop" in line or "open loop" in line for line in lines) == 2
    assert main(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == summary


def test_a_stream_without_an_end_or_with_an_error_is_no_answer() -> None:
    async def read(*lines: str) -> list[Any]:
        async def source() -> Any:
            for line in lines:
                yield line

        return [event async for event in events(source())]

    assert asyncio.run(read('data: {"a": 1}', "", "data:[DONE]", "data: {")) == [{"a": 1}]
    for lines in (['data: {"a": 1}'], ['data: {"error": {}}', "data: [DONE]"]):
        with pytest.raises(BadAnswerError):
            asyncio.run(read(*lines))
