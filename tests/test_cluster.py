"""The files that start a cluster are what Ray and KubeRay take and have what configs/serve.yaml asks for."""

import json
import os
import re
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start
from ray.serve.schema import DeploymentSchema, ServeDeploySchema

from serve.config import DeploymentConfig, ServeConfig, TargetConfig
from specdecode.config import check_config

ROOT = Path(__file__).parents[1]
LAUNCHER_FILES = ("cluster.yaml", "configs/cluster/on_premises.yaml")
RAY_SERVICE = "configs/cluster/rayservice.yaml"
CLUSTER_FILES = (*LAUNCHER_FILES, RAY_SERVICE)
PORTS = (
    "port",
    "dashboard_port",
    "ray_client_server_port",
    "object_manager_port",
    "node_manager_port",
    "runtime_env_agent_port",
    "dashboard_agent_grpc_port",
    "dashboard_agent_listen_port",
    "metrics_export_port",
)
HTTP_PORT = 8000
EXCHANGE_PORTS = range(20000, 21000)

Resources = dict[str, Fraction]


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind: what each of them has, and how many there are from the start."""

    resources: Resources
    num_at_start: int


@dataclass(frozen=True)
class Start:
    """How a node's commands call `ray start`."""

    auth_mode: str
    niceness: str
    options: dict[str, Any]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def launcher_config(name: str) -> dict[str, Any]:
    """The file as `ray up` reads it, defaults filled in."""
    config: dict[str, Any] = prepare_config(read(name))
    validate_config(config)
    return config


def run_start(commands: list[str], address: str, folder: Path) -> Start | str:
    """Runs a node's start commands in a shell where `ray` only writes down its call; what went wrong if a command fails."""
    record = folder / "record.json"
    stubs = {
        "ray": f"""#!/bin/sh
[ "$1" = start ] || exit 0
printf "%s\\n" "$RAY_AUTH_MODE" "$RAY_worker_niceness" "$@" > {record}
""",
        "hostname": f'#!/bin/sh\necho "172.17.0.1 {address} fd00::1"\n',
    }
    for name, text in stubs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.defpath}", "RAY_HEAD_IP": "192.0.2.10", "HOME": str(folder)}
    for command in commands:
        done = subprocess.run(["bash", "-c", f"({command})"], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return done.stderr
    auth_mode, niceness, called, *arguments = record.read_text().splitlines()
    assert called == "start"
    return Start(auth_mode, niceness, start.make_context("start", arguments).params)


def starts(name: str, folder: Path) -> dict[str, Start]:
    """How the head and each worker of a file for `ray up` are started; the workers of a cloud are all started alike."""
    config = launcher_config(name)
    provider = config["provider"]
    nodes = {"head": (config["head_start_ray_commands"], provider.get("head_ip", "192.0.2.10"))}
    for address in provider.get("worker_ips", ["192.0.2.99"]):
        nodes[f"worker {address}"] = (config["worker_start_ray_commands"], address)
    found = {node: run_start(commands, address, folder) for node, (commands, address) in nodes.items()}
    return {node: result for node, result in found.items() if isinstance(result, Start)}


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / RAY_SERVICE).read_text(encoding="utf-8")))


def ray_service() -> dict[str, Any]:
    [service] = [manifest for manifest in manifests() if manifest["kind"] == "RayService"]
    return service


def serve_config_v2() -> dict[str, Any]:
    return yaml.safe_load(ray_service()["spec"]["serveConfigV2"])


def amounts(resources: dict[str, float]) -> Resources:
    return {name: Fraction(str(amount)) for name, amount in resources.items()}


def declared(node_types: dict[str, Any], head: str) -> dict[str, NodeType]:
    """The node types of an autoscaler's configuration."""
    return {
        name: NodeType(amounts(node["resources"]), 1 if name == head else node["min_workers"])
        for name, node in node_types.items()
    }


def nodes_of(name: str, folder: Path) -> dict[str, NodeType]:
    """The kinds of nodes of a cluster file, with what Ray will know of each."""
    if name == "cluster.yaml":
        config = launcher_config(name)
        return declared(config["available_node_types"], config["head_node_type"])
    if name == RAY_SERVICE:
        cluster = {
            "metadata": {"name": "specdecode", "namespace": "default"},
            "spec": ray_service()["spec"]["rayClusterConfig"],
        }
        config = _derive_autoscaling_config_from_ray_cr(cluster)
        return declared(config["available_node_types"], config["head_node_type"])
    found = {}
    for node, call in starts(name, folder).items():
        custom = json.loads(call.options["resources"])
        num_cpus = call.options["num_cpus"] if call.options["num_cpus"] is not None else 4  # the machine's own
        found[node] = NodeType(amounts({"CPU": num_cpus, "GPU": call.options["num_gpus"], **custom}), 1)
    return found


def demand(deployment: DeploymentConfig) -> Resources:
    """What one replica asks for; Serve reserves one CPU where nothing is said."""
    options = deployment.options().get("ray_actor_options", {})
    named = {"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
    return {name: amount for name, amount in amounts(named).items() if amount}


def demands() -> dict[str, Resources]:
    """What the replicas of configs/serve.yaml ask for."""
    [application] = read("configs/serve.yaml")["applications"]
    config = check_config(application["args"], ServeConfig, where="configs/serve.yaml")
    drafts = {f"Draft-{name}": draft.deployment for name, draft in config.draft_models.items() if draft.is_deployed}
    deployments = {"Target": config.target.deployment, "Router": config.router.deployment, **drafts}
    return {name: demand(deployment) for name, deployment in deployments.items()}


def fits(asked: Resources, free: Resources) -> bool:
    return all(free.get(name, 0) >= amount for name, amount in asked.items())


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_a_cluster_file_is_what_ray_up_takes(name: str) -> None:
    launcher_config(name)


@pytest.mark.parametrize("name", CLUSTER_FILES)
def test_each_role_has_a_kind_of_node_of_its_own(name: str, tmp_path: Path) -> None:
    nodes = nodes_of(name, tmp_path)
    places = {role: [node for node, has in nodes.items() if fits(asked, has.resources)] for role, asked in demands().items()}
    assert {role: len(found) for role, found in places.items()} == dict.fromkeys(places, 1)
    assert len({found[0] for found in places.values()}) == len(places)


@pytest.mark.parametrize("name", CLUSTER_FILES)
def test_the_application_fits_on_the_nodes_that_are_there_from_the_start(name: str, tmp_path: Path) -> None:
    free = [dict(node.resources) for node in nodes_of(name, tmp_path).values() for _ in range(node.num_at_start)]
    for role, asked in demands().items():
        node = next((node for node in free if fits(asked, node)), None)
        assert node is not None, f"no node is left for {role}, which asks for {asked}"
        for resource, amount in asked.items():
            node[resource] -= amount


@pytest.mark.parametrize("name", CLUSTER_FILES)
@pytest.mark.parametrize("options", [{"resources": {"target_gpus": 1}}, {"num_gpus": 2}, {"num_gpus": 1, "num_cpus": 64}])
def test_what_no_node_has_fits_nowhere(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    asked = demand(DeploymentConfig(ray_actor_options=options))
    assert not [node for node, has in nodes_of(name, tmp_path).items() if fits(asked, has.resources)]


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_every_node_starts_with_the_token_that_was_copied_to_it(name: str, tmp_path: Path) -> None:
    config = launcher_config(name)
    found = starts(name, tmp_path)
    assert len(found) == 1 + len(config["provider"].get("worker_ips", ["any"]))
    assert {node: call.auth_mode for node, call in found.items()} == dict.fromkeys(found, "token")
    assert {node: call.niceness for node, call in found.items()} == dict.fromkeys(found, "0")
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        assert "chmod 600 ~/.ray/auth_token" in commands


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_the_dashboard_listens_on_loopback(name: str, tmp_path: Path) -> None:
    assert starts(name, tmp_path)["head"].options["dashboard_host"] == "127.0.0.1"


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_every_port_is_stated_and_no_two_meet(name: str, tmp_path: Path) -> None:
    for node, call in starts(name, tmp_path).items():
        stated = [call.options[port] for port in PORTS if node == "head" or port not in PORTS[:3]]
        workers = range(call.options["min_worker_port"], call.options["max_worker_port"] + 1)
        taken = [*stated, HTTP_PORT, *workers, *EXCHANGE_PORTS]
        assert None not in stated
        assert len(set(taken)) == len(taken)


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_the_table_of_ports_says_what_the_nodes_listen_on(name: str, tmp_path: Path) -> None:
    table = set(re.findall(r"^\| ([\d-]+) \|", (ROOT / "docs/deployment.md").read_text(encoding="utf-8"), re.MULTILINE))
    head = starts(name, tmp_path)["head"].options
    ranges = [range(head["min_worker_port"], head["max_worker_port"] + 1), EXCHANGE_PORTS]
    expected = {str(head[port]) for port in PORTS} | {f"{ports[0]}-{ports[-1]}" for ports in ranges} | {str(HTTP_PORT)}
    assert expected <= table


def test_a_machine_that_is_not_listed_does_not_start(tmp_path: Path) -> None:
    config = launcher_config("configs/cluster/on_premises.yaml")
    result = run_start(config["worker_start_ray_commands"], "192.0.2.1", tmp_path)
    assert isinstance(result, str)
    assert "no role" in result


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_nodes_get_the_package_and_its_pinned_versions(name: str) -> None:
    config = launcher_config(name)
    folder = "~/specdecode/"
    copied = {
        remote.removeprefix(folder): local for remote, local in config["file_mounts"].items() if remote.startswith(folder)
    }
    assert all(remote == local and (ROOT / local).exists() for remote, local in copied.items())
    assert copied.keys() >= {"specdecode", "serve", "jobs", "pyproject.toml", "README.md", "LICENSE"}
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        [install] = [command for command in commands if "--editable ~/specdecode" in command]
        assert "--constraint ~/specdecode/constraints.txt" in install


# What KubeRay's custom resource definitions require, as far as this file goes, and nothing that they do not know.
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_QUANTITIES = {
    "type": "object",
    "required": ["cpu", "memory"],
    "properties": {"cpu": {"pattern": r"^\d+$"}, "memory": {"pattern": r"^\d+Gi$"}, "nvidia.com/gpu": {"pattern": r"^\d+$"}},
    "additionalProperties": False,
}
_TEMPLATE = {
    "type": "object",
    "required": ["metadata", "spec"],
    "properties": {
        "metadata": {"type": "object", "properties": {"labels": _STRINGS}, "additionalProperties": False},
        "spec": {
            "type": "object",
            "required": ["containers"],
            "properties": {
                "nodeSelector": _STRINGS,
                "tolerations": {"type": "array"},
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "image", "resources"],
                        "properties": {
                            "name": {"pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
                            "image": {"type": "string"},
                            "ports": {
                                "type": "array",
                                "items": {
                                    "type": "object",
                                    "required": ["name", "containerPort"],
                                    "properties": {"name": {"type": "string"}, "containerPort": {"type": "integer"}},
                                    "additionalProperties": False,
                                },
                            },
                            "resources": {
                                "type": "object",
                                "required": ["limits", "requests"],
                                "properties": {"limits": _QUANTITIES, "requests": _QUANTITIES},
                                "additionalProperties": False,
                            },
                        },
                        "additionalProperties": False,
                    },
                },
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}
_RAY_SERVICE = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}},
        },
        "spec": {
            "type": "object",
            "required": ["serveConfigV2", "rayClusterConfig"],
            "properties": {
                "serveConfigV2": {"type": "string"},
                "rayClusterConfig": {
                    "type": "object",
                    "required": ["rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"],
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "authOptions": {"const": {"mode": "token"}},
                        "enableInTreeAutoscaling": {"type": "boolean"},
                        "headGroupSpec": {
                            "type": "object",
                            "required": ["rayStartParams", "template"],
                            "properties": {"rayStartParams": _STRINGS, "template": _TEMPLATE},
                            "additionalProperties": False,
                        },
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                                "properties": {
                                    "groupName": {"pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
                                    "replicas": {"type": "integer", "minimum": 0},
                                    "minReplicas": {"type": "integer", "minimum": 0},
                                    "maxReplicas": {"type": "integer", "minimum": 1},
                                    "labels": _STRINGS,
                                    "rayStartParams": _STRINGS,
                                    "template": _TEMPLATE,
                                },
                                "additionalProperties": False,
                            },
                        },
                    },
                    "additionalProperties": False,
                },
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}


def pod_templates() -> list[dict[str, Any]]:
    cluster = ray_service()["spec"]["rayClusterConfig"]
    return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_ray_service_has_the_fields_that_kuberay_requires() -> None:
    jsonschema.validate(ray_service(), _RAY_SERVICE)
    groups = [group["groupName"] for group in ray_service()["spec"]["rayClusterConfig"]["workerGroupSpecs"]]
    assert groups == ["target", "draft-small", "draft-large", "router"]


def test_the_ray_service_serves_what_the_serve_file_does() -> None:
    ServeDeploySchema.model_validate(serve_config_v2())
    [application] = serve_config_v2()["applications"]
    [expected] = read("configs/serve.yaml")["applications"]
    assert check_config(application["args"], ServeConfig, RAY_SERVICE) == check_config(
        expected["args"], ServeConfig, "serve.yaml"
    )
    assert application == expected


def test_the_ray_service_runs_one_image_with_the_pinned_ray() -> None:
    assert len({container["image"] for template in pod_templates() for container in template["spec"]["containers"]}) == 1
    version = ray_service()["spec"]["rayClusterConfig"]["rayVersion"]
    assert f"ray=={version}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_pods_ask_for_what_they_may_use() -> None:
    """Kubernetes allows no more of a GPU than is asked for, and a pod that gets less memory than its limit may be evicted."""
    for template in pod_templates():
        for container in template["spec"]["containers"]:
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_network_policy_covers_every_pod() -> None:
    [policy] = [manifest for manifest in manifests() if manifest["kind"] == "NetworkPolicy"]
    assert policy["apiVersion"] == "networking.k8s.io/v1"
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    selected = policy["spec"]["podSelector"]["matchLabels"]
    assert all(template["metadata"]["labels"].items() >= selected.items() for template in pod_templates())
    open_to_all = [rule for rule in policy["spec"]["ingress"] if not rule.get("from")]
    assert not open_to_all


@pytest.mark.parametrize("name", ["docs/deployment.md", "docs/security.md"])
def test_links_lead_to_files(name: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert local or name.endswith("security.md")
    assert [link for link in local if not ((ROOT / name).parent / link).is_file()] == []


def test_the_examples_for_a_serve_file_name_options_that_there_are() -> None:
    text = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    examples = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]
    [application] = [application for example in examples for application in example.get("applications", [])]
    for deployment in application["deployments"]:
        assert deployment.keys() <= DeploymentSchema.model_fields.keys()
        DeploymentSchema.model_validate(deployment)
    [deployment] = [example["deployment"] for example in examples if "deployment" in example]
    check_config(deployment, DeploymentConfig, where="docs/deployment.md")
    [target] = [example["target"] for example in examples if "target" in example]
    check_config(target, TargetConfig, where="docs/deployment.md")
