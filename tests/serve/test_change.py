"""A deployment changes while it serves, its router's defaults at once, all else replica by replica; and no request fails."""

import asyncio
import copy
import logging
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve.local import load_deployment
from serve.reader import Defaults
from specdecode.decoding.sequence import Route
from specdecode.errors import ConfigError
from tests.serve.inprocess import BODY, FakeTarget, routed
from tests.serve.serving import Serving, serving, small_config


def test_a_user_config_changes_what_applies_to_the_next_request() -> None:
    async def run() -> list[tuple[Route, str]]:
        target = FakeTarget()
        async with routed(target) as (client, router):
            for user_config in (
                None,
                {"k": 2},
                {"default_draft": "chat", "verifier": "block"},
                {"default_draft": None},
                {},
                {"k": 3},
                None,
            ):
                router.reconfigure(user_config)
                await client.post("/v1/completions", json=BODY)
            router.reconfigure({"default_draft": None, "k": 6})
            await client.post("/v1/completions", json={**BODY, "speculative_decoding": {"draft": "code"}})
        return [(generation.route, generation.params.verifier) for generation in target.asked]

    given = (Route("code", 4), "rejection")
    assert asyncio.run(run()) == [
        given,
        (Route("code", 2), "rejection"),
        (Route("chat", 4), "block"),
        (Route(), "rejection"),
        given,
        (Route("code", 3), "rejection"),
        given,
        (Route("code", 6), "rejection"),
    ]


MISTAKES = [
    ({"colour": "red"}, "colour: unknown key, got 'red'"),
    ({"k": "4"}, "k: input should be a valid integer, got '4'"),
    ({"k": -1}, "k: input should be greater than or equal to 0, got -1"),
    ({"k": 17}, "k: expected at most router.max_k (16), got 17"),
    ({"verifier": "maybe"}, "verifier: input should be 'rejection', 'block' or 'coupled', got 'maybe'"),
]


@pytest.mark.parametrize(
    ("user_config", "message"),
    [*MISTAKES, ({"default_draft": "x"}, "default_draft: expected one of ['chat', 'code'], got 'x'")],
)
def test_a_mistake_is_one_line_in_the_log_and_changes_nothing(
    user_config: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> Defaults:
        async with routed(FakeTarget()) as (_, router):
            router.reconfigure({"k": 2})
            router.reconfigure(user_config)
            return router._defaults

    serve_logger = logging.getLogger("ray.serve")
    serve_logger.addHandler(caplog.handler)
    try:
        assert asyncio.run(run()) == Defaults(Route("code", 2), "rejection")
    finally:
        serve_logger.removeHandler(caplog.handler)
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.getMessage() == f"refused, all stays as it is: user_config of Router: {message}"


def load(tmp_path: Path, deployments: Any) -> dict[str, dict[str, Any]]:
    values = small_config()
    values["applications"][0]["deployments"] = deployments
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_deployment(file).overrides


def test_a_files_deployments_are_taken(tmp_path: Path) -> None:
    deployments = [
        {"name": "Router", "user_config": {"k": 2}, "max_queued_requests": 7},
        {"name": "Target", "num_replicas": 1, "ray_actor_options": {"num_cpus": 0.3}},
    ]
    assert load(tmp_path, deployments) == {
        "Router": {"user_config": {"k": 2}, "max_queued_requests": 7},
        "Target": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0.3}},
    }


@pytest.mark.parametrize(
    ("deployment", "message"),
    [
        ({"name": "Draft-code"}, "deployments.0.name: expected one of Router, Target, got 'Draft-code'"),
        ({"name": "Router", "colour": "red"}, "deployments.0: colour: unknown key"),
        ({"name": "Target", "user_config": {"k": 2}}, "deployments.0.user_config: only Router takes one, not Target"),
        ({"name": "Router", "num_replicas": "many"}, "num_replicas"),
        *(({"name": "Router", "user_config": values}, f"deployments.0.user_config: {message}") for values, message in MISTAKES),
    ],
    ids=str,
)
def test_a_mistake_in_them_is_one_line(tmp_path: Path, deployment: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, [deployment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, dict[str, Any]]]:
    values = small_config()
    values["applications"][0]["deployments"] = [{"name": "Router", "user_config": {"k": 2}}]
    with serving(tmp_path_factory.mktemp("changing"), values, {"RAY_AUTH_MODE": "disabled"}) as server:
        values["http_options"]["port"] = int(server.url.rpartition(":")[2])
        yield server, values


def deploy(server: Serving, values: dict[str, Any]) -> None:
    """What `serve deploy` does; returns once the deployment is as it is to be."""
    [line] = server.lines("dashboard  http")
    found = re.search(r"http://\S+", line)
    assert found
    url = f"{found.group()}/api/serve/applications/"
    assert httpx.put(url, json=values, timeout=60).status_code == 200
    end = time.monotonic() + 120
    while True:
        time.sleep(0.5)
        app = httpx.get(url, timeout=60).json()["applications"]["specdecode"]
        states = {replica["state"] for deployment in app["deployments"].values() for replica in deployment["replicas"]}
        if app["status"] == "RUNNING" and states == {"RUNNING"}:
            return
        assert time.monotonic() < end, app["message"]


def default_k(server: Serving) -> int:
    response = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60)
    k: int = response.json()["speculative_decoding"]["K"]
    return k


def test_a_deployment_changes_under_load_and_no_request_fails(changing: tuple[Serving, dict[str, Any]]) -> None:
    server, values = changing
    assert default_k(server) == 2
    is_over, answers = threading.Event(), []

    def ask() -> None:
        options = {"draft": "generic", "K": 4}  # with which the seed gives one answer
        body = {**BODY, "max_tokens": 60, "ignore_eos": True, "seed": 1, "stream": True, "speculative_decoding": options}
        while not is_over.is_set():
            answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=90).text)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        changed = copy.deepcopy(values)
        application = changed["applications"][0]
        application["args"]["drafts"]["code"] = {"model": "tiny/draft-code", "placement": "local"}
        application["deployments"][0]["user_config"] = {"k": 3}
        deploy(server, changed)
        assert default_k(server) == 3
        routers = server.replicas("Router")
        application["deployments"][0]["user_config"] = {"k": 1, "default_draft": "code"}
        deploy(server, changed)
        assert default_k(server) == 1
        assert server.replicas("Router") == routers
    finally:
        is_over.set()
        for thread in threads:
            thread.join(90)
    assert len(answers) > 8
    texts = {"".join(re.findall(r'"text": "((?:[^"\\]|\\.)*)"', answer)) for answer in answers}
    assert len(texts) == 1
    assert all(answer.endswith("data: [DONE]\n\n") and '"error"' not in answer for answer in answers)
