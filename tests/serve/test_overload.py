"""Who cannot be served is told so at once, or in the time that was said, in OpenAI's words; nothing goes on behind it."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from ray.serve.exceptions import BackPressureError

from serve.access import _timeout_s
from serve.app import build
from serve.config import ServeConfig
from serve.errors import error_response
from specdecode.errors import OverloadedError
from tests.serve.inprocess import BODY, FakeTarget, routed
from tests.serve.serving import CPU_SHARE, Serving, serving, small_config


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(
    "error", [OverloadedError("full"), BackPressureError(num_queued_requests=5, max_queued_requests=5)], ids=repr
)
def test_a_full_queue_is_429_and_says_when_to_come_again(error: Exception) -> None:
    response = error_response(error)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_target_that_is_still_loading_is_503(is_stream: bool) -> None:
    async def run() -> None:
        async with routed(FakeTarget(is_loaded=False)) as (client, _):
            for response in (
                await client.post("/v1/completions", json={**BODY, "stream": is_stream}),
                await client.get("/health"),
                await client.get("/v1/models"),
            ):
                assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
                assert response.headers["retry-after"] == "1"

    asyncio.run(run())


@pytest.mark.parametrize("is_stream", [False, True])
def test_no_replica_in_time_is_503(is_stream: bool) -> None:
    async def run() -> None:
        target = FakeTarget(is_there=False)
        async with routed(target, failover_timeout_s=0.2) as (client, _):
            response = await client.post("/v1/completions", json={**BODY, "stream": is_stream, "n": 2})
            assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
            assert "within 0.2 s" in error_of(response)["message"]
            assert response.headers["retry-after"] == "1"
            assert target.num_open == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("config", "headers"),
    [({"request_timeout_s": 0.3}, {}), ({}, {"X-Request-Timeout-Seconds": "0.33"})],
    ids=["config", "header"],
)
def test_a_request_that_takes_too_long_is_504_and_cancelled(config: dict[str, Any], headers: dict[str, str]) -> None:
    async def run() -> None:
        target = FakeTarget(period_s=0.02)
        async with routed(target, **config) as (client, _):
            body = {**BODY, "max_tokens": 1000, "n": 2}
            started = time.perf_counter()
            response = await client.post("/v1/completions", json=body, headers=headers)
            assert 0.2 < time.perf_counter() - started < 1
            assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
            assert target.num_open == 0
            streamed = await client.post("/v1/completions", json={**body, "stream": True}, headers=headers)
            *pieces, last = events_of(streamed)
            assert streamed.status_code == 200
            assert len(pieces) > 4
            assert last["error"]["code"] == "timeout"
            assert "[DONE]" not in streamed.text
            assert target.num_open == 0

    asyncio.run(run())


def test_a_request_that_is_quick_enough_is_not_disturbed() -> None:
    async def run() -> None:
        async with routed(FakeTarget(), request_timeout_s=5.0) as (client, _):
            response = await client.post("/v1/completions", json=BODY, headers={"X-Request-Timeout-Seconds": "5"})
            assert response.json()["usage"]["completion_tokens"] == 8
        await asyncio.sleep(0)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), ("10", 9.75), ("1", 0.9), ("0", None), ("-1", None), ("soon", None), ("nan", None), ("inf", None)],
)
def test_a_clients_timeout_leaves_time_for_the_answer(given: str | None, expected: float | None) -> None:
    assert _timeout_s(given) == expected


def deployments(config: dict[str, Any]) -> dict[str, Any]:
    """The deployments of an application, by name."""
    found, todo = {}, [build(ServeConfig.model_validate(config))]
    while todo:
        deployment = todo.pop()._bound_deployment
        found[deployment.name] = deployment
        for argument in deployment.init_args:
            todo += [
                part
                for part in (argument.values() if isinstance(argument, dict) else [argument])
                if hasattr(part, "_bound_deployment")
            ]
    return found


def test_every_queue_has_an_end() -> None:
    config = {"target": {"model": "tiny/target", "engine": {"max_queued": 10}, "deployment": {"num_replicas": 2}}}
    found = deployments(config)
    router, target = found["Router"]._deployment_config, found["Target"]._deployment_config
    assert target.max_ongoing_requests > 16 + 10
    assert router.max_ongoing_requests > 2 * (16 + 10)  # so that a target refuses first
    assert 0 < router.max_queued_requests < 1000
    assert (router.backpressure_config.status_code, router.backpressure_config.retry_after_s) == (429, 1.0)


def test_a_configuration_has_the_last_word() -> None:
    deployment = {"max_queued_requests": 3, "backpressure_config": {"status_code": 503}, "max_surge_percent": 20}
    found = deployments({"target": {"model": "tiny/target"}, "router": {"deployment": deployment}})
    router = found["Router"]._deployment_config
    assert (router.max_queued_requests, router.backpressure_config.status_code, router.max_surge_percent) == (3, 503, 20)


@pytest.mark.parametrize(
    ("wants", "surge"), [({}, 100), ({"num_cpus": 2}, 100), ({"num_gpus": 1}, 0), ({"resources": {"a": 1}}, 0)]
)
def test_a_target_with_a_device_of_its_own_makes_room_before_it_is_replaced(wants: dict[str, Any], surge: int) -> None:
    config = {"target": {"model": "tiny/target", "deployment": {"ray_actor_options": wants}}}
    assert deployments(config)["Target"]._deployment_config.max_surge_percent == surge


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    def change(args: dict[str, Any]) -> None:
        args["target"]["engine"] |= {"max_batch": 1, "max_queued": 1}
        args["target"]["deployment"] = CPU_SHARE
        args["router"]["deployment"] |= {"max_ongoing_requests": 2, "max_queued_requests": 1}
        args["router"]["failover_timeout_s"] = 1.0

    with serving(tmp_path_factory.mktemp("small"), small_config(change)) as server:
        yield server


LONG = {**BODY, "max_tokens": 1800, "ignore_eos": True, "stream": True}


def test_who_finds_every_place_taken_is_told_to_come_again(small: Serving) -> None:
    with httpx.Client(base_url=small.url, timeout=60) as client:
        response = client.post("/v1/completions", json={**BODY, "n": 3})
        assert (response.status_code, error_of(response)["code"]) == (429, "overloaded")
        assert response.headers["retry-after"] == "1"
        with ExitStack() as streams:
            first = streams.enter_context(client.stream("POST", "/v1/completions", json=LONG))
            lines = first.iter_lines()  # which ends the stream when it is garbage
            next(lines)
            waiting = [threading.Thread(target=client.post, args=("/v1/completions",), kwargs={"json": BODY}) for _ in range(2)]
            for thread in waiting:
                thread.start()
                time.sleep(0.3)
            response = client.post("/v1/completions", json=BODY)  # one too many for Serve itself
            assert response.status_code == 429
            assert response.headers["retry-after"] == "1"
        for thread in waiting:
            thread.join(60)
        assert client.post("/v1/completions", json=BODY).status_code == 200


def test_the_openai_client_waits_and_comes_again(small: Serving) -> None:
    with OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0) as client, pytest.raises(openai.RateLimitError):
        client.completions.create(model="tiny", prompt="a", n=3)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_clients_timeout_is_kept_before_serves_proxy_keeps_it(small: Serving, is_stream: bool) -> None:
    id = f"late-{is_stream}"
    headers = {"X-Request-Timeout-Seconds": "1", "X-Request-Id": id}
    response = httpx.post(f"{small.url}/v1/completions", json={**LONG, "stream": is_stream}, headers=headers, timeout=30)
    error = events_of(response)[-1]["error"] if is_stream else error_of(response)
    assert (response.status_code, error["code"]) == (200 if is_stream else 504, "timeout")
    small.wait_for_lines(f"generation id={id}-0/", "ending=cancelled")
    [line] = small.wait_for_lines(f"request id={id} ")
    assert ("error=timeout" if is_stream else "status=504") in line


def test_the_only_target_gone_is_503_and_it_comes_back(small: Serving) -> None:
    statuses = []

    def read() -> None:
        with httpx.stream("POST", f"{small.url}/v1/completions", json=LONG, timeout=60) as response:
            text = "".join(response.iter_text())
            statuses.append(json.loads(text.strip().rpartition("data: ")[2]))

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(1)
    [replica] = small.replicas("Target")
    os.kill(replica, signal.SIGKILL)
    response = httpx.post(f"{small.url}/v1/completions", json=BODY, timeout=30)
    assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
    assert response.headers["retry-after"] == "1"
    reader.join(60)
    assert statuses[0]["error"]["code"] == "unavailable"
    for _ in range(300):
        if httpx.post(f"{small.url}/v1/completions", json=BODY, timeout=30).status_code == 200:
            return
        time.sleep(0.5)
    raise AssertionError("the target did not come back")
