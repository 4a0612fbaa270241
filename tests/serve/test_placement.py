"""Where replicas run: what a configuration may say of it, and that it is so on a cluster of several nodes."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.app import wire
from serve.config import DeploymentConfig, DraftModelConfig, ServeConfig, TargetConfig
from specdecode.config import check_config
from specdecode.errors import ConfigError
from specdecode.text import Tokenizer
from tests.serve.conftest import ROOT, Expect
from tests.serve.nodes import Node, Nodes, nodes
from tests.serve.serving import Serving, field, serving, small_config

GPU_BUNDLES = [{"CPU": 1, "GPU": 1}, {"GPU": 1}]

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown actor option": ({"ray_actor_options": {"num_gpu": 1}}, "x: ray_actor_options.num_gpu: unknown key, got 1"),
    "GPUs in words": ({"ray_actor_options": {"num_gpus": "1"}}, "ray_actor_options.num_gpus: input should be a valid number"),
    "part of several GPUs": (
        {"ray_actor_options": {"num_gpus": 1.5}},
        "num_gpus: expected a fraction of one GPU, or whole ones",
    ),
    "resource in words": ({"ray_actor_options": {"resources": {"a": "b"}}}, "ray_actor_options.resources.a: input should be"),
    "label in numbers": (
        {"ray_actor_options": {"label_selector": {"a": 1}}},
        "label_selector.a: input should be a valid string",
    ),
    "broken label": ({"ray_actor_options": {"label_selector": {"a": "in(x"}}}, "x: top level: invalid label selector value"),
    "unknown autoscaling option": (
        {"autoscaling_config": {"min_replica": 1}},
        "x: autoscaling_config: min_replica: unknown key, expected one of min_replicas, initial_replicas, max_replicas",
    ),
    "autoscaling in words": (
        {"autoscaling_config": {"max_replicas": "4"}},
        "autoscaling_config: max_replicas: input should be a valid integer, got '4'",
    ),
    "fewer at most than at least": (
        {"autoscaling_config": {"min_replicas": 3, "max_replicas": 2}},
        "max_replicas (2) must be greater than or equal to min_replicas (3)",
    ),
    "fixed and scaled": (
        {"num_replicas": 2, "autoscaling_config": {"max_replicas": 3}},
        "num_replicas is not allowed when autoscaling_config is provided",
    ),
    "unknown strategy": (
        {"placement_group_bundles": GPU_BUNDLES, "placement_group_strategy": "STRICT"},
        "placement_group_strategy: input should be 'PACK', 'SPREAD', 'STRICT_PACK' or 'STRICT_SPREAD', got 'STRICT'",
    ),
    "strategy without bundles": ({"placement_group_strategy": "PACK"}, "`placement_group_bundles` must also be provided"),
    "labels without bundles": (
        {"placement_group_bundle_label_selector": [{"a": "b"}]},
        "`placement_group_bundles` must also be provided",
    ),
    "no bundles": ({"placement_group_bundles": []}, "bundles must be a non-empty list"),
    "a first bundle without the replica's GPU": (
        {"placement_group_bundles": [{"CPU": 1}], "ray_actor_options": {"num_gpus": 1}},
        "`num_gpus` for the actor is 1.0, but the bundle only has 0 `GPU`",
    ),
    "no replicas on a node": (
        {"max_replicas_per_node": 0},
        "max_replicas_per_node: input should be greater than or equal to 1",
    ),
    "bundles and a limit for nodes": (
        {"placement_group_bundles": GPU_BUNDLES, "max_replicas_per_node": 1},
        "max_replicas_per_node is not allowed when placement_group_bundles is provided",
    ),
}


@pytest.mark.parametrize(("values", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_about_placement_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(values, DeploymentConfig, "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ACTOR = {
    "num_cpus": 0.5,
    "num_gpus": 1.0,
    "memory": 1e9,
    "resources": {"target_gpu": 1.0},
    "accelerator_type": "L4",
    "label_selector": {"size": "!small"},
    "fallback_strategy": [{"label_selector": {"size": "large"}}],
    "runtime_env": {"env_vars": {"A": "1"}},
}


def test_every_option_of_placement_reaches_serve() -> None:
    selector = [{"size": "small"}, {"size": "large"}]
    target = {
        "ray_actor_options": ACTOR,
        "placement_group_bundles": [{"CPU": 1, "GPU": 1, "target_gpu": 1, "memory": 1e9}, {"GPU": 1}],
        "placement_group_strategy": "STRICT_PACK",
        "placement_group_bundle_label_selector": selector,
        "autoscaling_config": {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 16, "downscale_delay_s": 5},
    }
    config = {
        "target": {"model": "tiny/target", "deployment": target},
        "router": {"deployment": {"max_replicas_per_node": 2}},
    }
    router = wire(check_config(config, ServeConfig, "x"), {})._bound_deployment
    [found] = [argument._bound_deployment for argument in router.init_args if hasattr(argument, "_bound_deployment")]
    assert found._replica_config.ray_actor_options == ACTOR
    assert found._replica_config.placement_group_bundles == target["placement_group_bundles"]
    assert found._replica_config.placement_group_strategy == "STRICT_PACK"
    assert found._replica_config.placement_group_bundle_label_selector == selector
    autoscaling = found._deployment_config.autoscaling_config
    assert (autoscaling.max_replicas, autoscaling.target_ongoing_requests, autoscaling.downscale_delay_s) == (3, 16, 5)
    assert router._replica_config.max_replicas_per_node == 2


def test_options_that_do_not_go_together_across_files_are_one_line() -> None:
    config = {"target": {"model": "tiny/target", "deployment": {"num_replicas": 2}}}
    overrides = {"Target": {"autoscaling_config": {"max_replicas": 3}}}
    with pytest.raises(ConfigError, match=r"^deployment Target: Manually setting num_replicas is not allowed[^\n]*$"):
        wire(check_config(config, ServeConfig, "x"), overrides)


@pytest.mark.parametrize(
    ("deployment", "is_wanted"),
    [
        ({}, False),
        ({"ray_actor_options": {"num_cpus": 2, "memory": 1e9}}, False),
        ({"ray_actor_options": {"num_gpus": 0.5}}, True),
        ({"ray_actor_options": {"resources": {"target_gpu": 1}}}, True),
        ({"placement_group_bundles": [{"CPU": 1}, {"CPU": 1}]}, False),
        ({"placement_group_bundles": [{"CPU": 1}, {"GPU": 1}]}, True),
    ],
)
def test_a_replica_wants_a_device_if_it_asks_for_more_than_cpus(deployment: dict[str, Any], is_wanted: bool) -> None:
    assert check_config(deployment, DeploymentConfig, "x").wants_device is is_wanted


def test_a_target_of_several_processes_reserves_what_it_asks_for_as_often_on_one_node() -> None:
    def options(**deployment: Any) -> dict[str, Any]:
        return check_config({"model": "tiny/target", "tp": 2, "deployment": deployment}, TargetConfig, "x").options()

    plain = {"CPU": 1, "GPU": 1}
    assert options()["placement_group_bundles"] == [plain, plain]
    assert options()["placement_group_strategy"] == "STRICT_PACK"
    assert options()["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}
    asked = options(ray_actor_options={**ACTOR, "resources": {"target_gpu": 1}}, num_replicas=2)
    whole = {"CPU": 0.5, "GPU": 1, "memory": 1e9, "target_gpu": 1, "accelerator_type:L4": 0.001}
    assert asked["placement_group_bundles"] == [whole, whole]
    assert asked["placement_group_bundle_label_selector"] == [{"size": "!small"}]
    assert (asked["ray_actor_options"], asked["num_replicas"]) == (ACTOR, 2)
    assert options(ray_actor_options={"num_gpus": 0})["placement_group_bundles"] == [{"CPU": 1}] * 2
    assert options(placement_group_bundles=[plain] * 3)["placement_group_bundles"] == [plain] * 3
    for deployment in ({}, {"ray_actor_options": ACTOR}):
        target = {"model": "tiny/target", "tp": 2, "deployment": deployment}
        wire(check_config({"target": target}, ServeConfig, "x"), {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"placement_group_bundles": [{"CPU": 1, "GPU": 1}]},
            "deployment.placement_group_bundles: expected one for each of tp 2",
        ),
        (
            {"placement_group_bundles": GPU_BUNDLES, "placement_group_strategy": "SPREAD"},
            "deployment.placement_group_strategy: expected STRICT_PACK with tp 2, got SPREAD",
        ),
    ],
)
def test_processes_of_one_target_need_a_bundle_each_on_one_node(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config({"model": "tiny/target", "tp": 2, "deployment": values}, TargetConfig, "x")
    assert message in str(caught.value)


def test_a_draft_is_one_process() -> None:
    with pytest.raises(ConfigError, match=r"^x: top level: tp: expected 1 of a draft, got 2"):
        check_config({"model": "tiny/draft-code", "tp": 2}, DraftModelConfig, "x")


PROMPT = "def read_lines(path):\n"
NUM_TOKENS = 400
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
DRAFTS = ("code", "chat", "near")
DRAFT_NODE = {"num_cpus": 1, "num_gpus": 1, "resources": {"draft_gpu": 1}}


@dataclass
class Machines:
    """A cluster of a head without GPUs and of nodes with one GPU each, and what is served on it."""

    nodes: Nodes
    targets: list[Node]
    drafts: Node
    server: Serving

    def placed(self, model: str) -> list[str]:
        """What the replicas of a model said of where they are."""
        return self.server.lines(f"model={model} placed")

    def complete(self, draft: str, **options: Any) -> dict[str, Any]:
        body = {**BODY, "max_tokens": 24, "speculative_decoding": {"draft": draft}, **options}
        response = httpx.post(f"{self.server.url}/v1/completions", json=body, timeout=90)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def wait_until_drafted(self, draft: str, timeout_s: float = 90) -> None:
        """Returns once the draft was of use for several answers in a row, and so to each target."""
        end, in_a_row = time.monotonic() + timeout_s, 0
        while in_a_row < 6:
            drafted = self.complete(draft, max_tokens=8)["speculative_decoding"]["num_draft_tokens"]
            in_a_row = in_a_row + 1 if drafted > 0 else 0
            assert time.monotonic() < end, self.server.log.read_text(errors="replace")[-4000:]
            time.sleep(0.05)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("machines")

    def change(args: dict[str, Any]) -> None:
        args["target"]["deployment"] = {
            "num_replicas": 2,
            "graceful_shutdown_timeout_s": 5.0,  # one of them is still waiting for a node at the end
            "ray_actor_options": {"num_cpus": 0.2, "num_gpus": 1, "resources": {"target_gpu": 1}},
        }
        half = {"num_cpus": 0.1, "num_gpus": 0.5, "resources": {"draft_gpu": 0.5}}
        beside = {"num_cpus": 0.1, "label_selector": {"role": "target"}}
        for name, model, options in zip(DRAFTS, ("code", "chat", "reasoning"), (half, half, beside), strict=True):
            args["drafts"][name] = {"model": f"tiny/draft-{model}", "deployment": {"ray_actor_options": options}}
        args["router"]["deployment"] = {"ray_actor_options": {"num_cpus": 0.1, "label_selector": {"role": "router"}}}
        args["router"]["failover_timeout_s"] = 300.0

    with nodes(folder / "nodes.txt", num_cpus=2, labels={"role": "router"}) as cluster:
        target = {"num_cpus": 1, "num_gpus": 1, "resources": {"target_gpu": 1}, "labels": {"role": "target"}}
        targets = [cluster.add(**target, node_ip_address=f"127.0.0.{number}") for number in (2, 3)]
        drafts = cluster.add(**DRAFT_NODE, node_ip_address="127.0.0.4")
        environment = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
        with serving(folder, small_config(change), environment) as server:
            machines = Machines(cluster, targets, drafts, server)
            for name in DRAFTS:
                machines.wait_until_drafted(name)
            yield machines


def test_replicas_run_on_the_nodes_and_devices_that_the_configuration_names(machines: Machines) -> None:
    targets = machines.placed("tiny/target")
    assert {field(line, "node") for line in targets} == {node.id for node in machines.targets}
    assert [len(node.replicas("Target")) for node in [*machines.targets, machines.drafts]] == [1, 1, 0]
    halves = machines.placed("tiny/draft-code") + machines.placed("tiny/draft-chat")
    assert [field(line, "node") for line in halves] == [machines.drafts.id] * 2
    assert {field(line, "gpus") for line in targets + halves} == {"0"}
    assert [len(machines.drafts.replicas(f"Draft-{name}")) for name in DRAFTS] == [1, 1, 0]
    [near] = machines.placed("tiny/draft-reasoning")
    assert field(near, "node") in {node.id for node in machines.targets}
    assert near.endswith("gpus=")
    assert not [node for node in [*machines.targets, machines.drafts] if node.replicas("Router")]


def test_a_lease_is_on_loopback_within_a_node_and_on_its_address_between_nodes(machines: Machines) -> None:
    homes = {replica(line): field(line, "address") for line in machines.placed("tiny/target")}

    def leases(draft: str) -> dict[str, str]:
        """By the target's address, where the draft was leased."""
        lines = machines.server.lines(f"draft {draft}: leased at")
        return {homes[replica(line)]: line.rpartition(" at ")[2].partition(":")[0] for line in lines}

    apart = {node.address: machines.drafts.address for node in machines.targets}
    assert leases("code") == leases("chat") == apart
    [near] = machines.placed("tiny/draft-reasoning")
    home = field(near, "address")
    assert leases("near") == {node.address: "127.0.0.1" if node.address == home else home for node in machines.targets}


def replica(line: str) -> str:
    """Which replica logged a line."""
    return line.partition(" -- ")[0].rpartition(" ")[2]


@pytest.mark.parametrize("draft", DRAFTS)
def test_answers_are_the_library_s(machines: Machines, draft: str, tokenizer: Tokenizer, expect: Expect) -> None:
    answer = machines.complete(draft, ignore_eos=False)
    assert answer["choices"][0]["text"] == expect(tokenizer.encode(PROMPT))
    assert answer["speculative_decoding"]["num_draft_tokens"] > 0


def stream(server: Serving, draft: str, id: str, seen: Callable[[int], None]) -> str:
    """Reads a long answer; `seen` hears how many events there were after each."""
    text, number = "", 0
    body = {**BODY, "stream": True, "speculative_decoding": {"draft": draft}}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers={"X-Request-Id": id}, timeout=300) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += "".join(choice["text"] for choice in event["choices"])
                number += 1
                seen(number)
    return text


def under_load(machines: Machines, name: str, kill: Callable[[], None]) -> list[str]:
    """Kills something in the midst of eight answers, each of which has begun; returns them."""
    begun = threading.Semaphore(0)

    def seen(number: int) -> None:
        if number == 5:
            begun.release()

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(stream, machines.server, "code", f"{name}-{number}", seen) for number in range(8)]
        assert all(begun.acquire(timeout=60) for _ in range(8))
        kill()
        return [answer.result() for answer in answers]


def test_a_draft_s_node_that_is_lost_costs_no_request_and_a_new_one_drafts(
    machines: Machines, tokenizer: Tokenizer, expect: Expect
) -> None:
    answers = under_load(machines, "draft", lambda: machines.nodes.kill(machines.drafts))
    assert answers == [expect(tokenizer.encode(PROMPT), max_tokens=NUM_TOKENS, ignore_eos=True)] * 8
    assert machines.complete("code")["speculative_decoding"]["num_draft_tokens"] == 0
    machines.wait_until_drafted("near")
    machines.drafts = machines.nodes.add(**DRAFT_NODE, node_ip_address="127.0.0.5")
    machines.wait_until_drafted("code")
    assert field(machines.placed("tiny/draft-code")[-1], "node") == machines.drafts.id
    assert machines.server.lines("draft code: leased at 127.0.0.5:")


def test_a_target_s_node_that_is_lost_in_mid_stream_leaves_no_gap(
    machines: Machines, tokenizer: Tokenizer, expect: Expect
) -> None:
    answers = under_load(machines, "target", lambda: machines.nodes.kill(machines.targets[0]))
    assert answers == [expect(tokenizer.encode(PROMPT), max_tokens=NUM_TOKENS, ignore_eos=True)] * 8
    lines = [machines.server.wait_for_lines(f"request id=target-{number} ")[0] for number in range(8)]
    assert sum(int(field(line, "resumptions")) for line in lines) > 0


def why_no_namespaces() -> str | None:
    """Why this user cannot have network namespaces here, or None."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return "unshare, nsenter and ip are not installed"
    probe = "ip link add name here type veth peer name there && unshare --net true"
    tried = subprocess.run(
        ["unshare", "-Urnpf", "--mount-proc", "sh", "-c", probe], capture_output=True, text=True, check=False
    )
    return None if tried.returncode == 0 else f"no network namespaces for this user: {tried.stderr.strip()}"


def test_the_exchange_crosses_the_network_between_two_machines(tmp_path: Path, tokenizer: Tokenizer, expect: Expect) -> None:
    if reason := why_no_namespaces():
        pytest.skip(reason)
    apart = ["unshare", "-Urnpf", "--mount-proc", "--kill-child"]  # whatever is left of it ends with it
    command = [*apart, sys.executable, "-m", "tests.serve.namespaces", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert seen["placed"] == "10.77.0.2"
    assert seen["lease"].startswith("10.77.0.2:")
    assert seen["lease"] in seen["connections"]
    assert seen["answer"]["choices"][0]["text"] == expect(tokenizer.encode(PROMPT))
    assert seen["answer"]["speculative_decoding"]["num_draft_tokens"] > 0
