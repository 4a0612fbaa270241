"""A running application in, what its replicas hold out: the drills and the soak compare it with what it should be."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from ray.util.state import list_actors

from serve.app import deployment_names
from serve.config import ServeConfig
from serve.draft import DraftState
from serve.target import TargetState

State = TypeVar("State")

HOST, PROXIES = "127.0.0.1", "HeadOnly"

_IMPORT_PATH = "jobs.interference:build"
_CALL_TIMEOUT_S = 15.0
_LIST_TIMEOUT_S = 20


@dataclass(frozen=True)
class Leaks:
    """What is held that should not be, with nothing to do.

    Attributes:
        num_leases: by how many leases and sessions there are too many or too few.
        num_rows: sequences, streams and requests that somebody still works on, and rows of caches that they hold.
        faults: what caches have found wrong with themselves.
    """

    num_leases: int = 0
    num_rows: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether all is as it should be."""
        return not (self.num_leases or self.num_rows or self.faults)


@dataclass(frozen=True)
class View:
    """What the replicas of an application hold, as they have said one after the other.

    Attributes:
        targets: of the target's replicas.
        drafts: of each deployed draft's.
    """

    targets: list[TargetState]
    drafts: dict[str, list[DraftState]]

    def is_connected(self, drafts: list[str]) -> bool:
        """Whether every target has these drafts, and no others."""
        return all(target.connected == dict.fromkeys(drafts, True) for target in self.targets)

    def leaks(self) -> Leaks:
        """What is held that should not be: every target leases every draft once, and nothing else is under way."""
        num_targets = len(self.targets)
        num_leases = 0
        for states in self.drafts.values():
            given, claimed = sum(s.num_leases for s in states), sum(s.num_sessions for s in states)
            num_leases += abs(given - num_targets) + abs(claimed - given)
        of_targets = (t.num_running + t.num_queued + t.num_streams + t.num_rows_in_use for t in self.targets)
        of_drafts = (state.num_pending for states in self.drafts.values() for state in states)
        faults = [t.cache_fault for t in self.targets] + [s.cache_fault for states in self.drafts.values() for s in states]
        return Leaks(num_leases, sum(of_targets) + sum(of_drafts), [fault for fault in faults if fault])


class Application:
    """An application that runs on this machine.

    Args:
        name: its name.
        config: what it is built of; whoever changes it deploys it then.
        port: where it answers.
    """

    def __init__(self, name: str, config: ServeConfig, port: int) -> None:
        self.name = name
        self.config = config
        self.port = port

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://{HOST}:{self.port}"

    def deploy(self, overrides: dict[str, dict[str, Any]]) -> None:
        """Has Serve make it as it is configured, as `serve deploy` does, with options of deployments that differ."""
        application = {
            "name": self.name,
            "route_prefix": "/",
            "import_path": _IMPORT_PATH,
            "args": self.config.model_dump(mode="json", exclude_unset=True),
            "deployments": [{"name": name, **options} for name, options in overrides.items()],
        }
        http_options = {"host": HOST, "port": self.port}
        schema = {"proxy_location": PROXIES, "http_options": http_options, "applications": [application]}
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(schema))

    def view(self) -> View:
        """Asks every replica of the target and of the drafts.

        Raises:
            Exception: one of them does not answer; Ray has many names for it.
        """
        targets = self.ask("Target", "inspect")
        return View(targets, {name: self.ask(f"Draft-{name}", "inspect") for name in self.draft_names})

    def ask(self, deployment: str, method: str, *arguments: Any, timeout_s: float = _CALL_TIMEOUT_S) -> list[Any]:
        """What all replicas of a deployment answer."""
        handle = serve.get_deployment_handle(deployment, self.name)
        return handle.broadcast(method, *arguments).results(timeout_s=timeout_s)

    @property
    def draft_names(self) -> list[str]:
        """The drafts with deployments of their own."""
        return [name for name, draft in self.config.draft_models.items() if draft.is_deployed]

    def pids(self) -> dict[str, list[int]]:
        """The processes of all replicas that live, by deployment."""
        found: dict[str, list[int]] = {name: [] for name in deployment_names(self.config)}
        address = ray.get_runtime_context().gcs_address  # there may be other clusters on this machine
        actors = list_actors(address, filters=[("state", "=", "ALIVE")], limit=1000, timeout=_LIST_TIMEOUT_S)
        for actor in actors:
            kind, _, deployment = actor.class_name.removeprefix("ServeReplica:").partition(":")
            if kind == self.name and deployment in found:
                found[deployment].append(actor.pid)
        return found

    def num_replicas(self) -> dict[str, int]:
        """How many replicas each deployment should have."""
        deployments = {"Router": self.config.router.deployment, "Target": self.config.target.deployment}
        deployments |= {f"Draft-{name}": self.config.draft_models[name].deployment for name in self.draft_names}
        counts = {name: deployment.num_replicas for name, deployment in deployments.items()}
        return {name: count if isinstance(count, int) else 1 for name, count in counts.items()}

    def has_all_replicas(self) -> bool:
        """Whether as many replicas run as should, and none besides."""
        application = serve.status().applications[self.name]
        running = {name: deployment.replica_states for name, deployment in application.deployments.items()}
        return application.status == "RUNNING" and running == {
            name: {"RUNNING": count} for name, count in self.num_replicas().items()
        }


def wait_for_leaks(application: Application, timeout_s: float) -> Leaks:
    """What is still held when nothing changes any more, or the time is over."""
    end = time.monotonic() + timeout_s
    while True:
        leaks = attempt(lambda: application.view().leaks())
        if leaks is not None and leaks.is_clean:
            return leaks
        if time.monotonic() > end:
            return leaks or Leaks(faults=["a replica does not answer"])
        time.sleep(0.1)


def attempt(ask: Callable[[], State]) -> State | None:
    """What it returns; None if it fails, as it may while replicas come and go."""
    try:
        return ask()
    except Exception:
        return None


def resident_bytes(pid: int) -> int:
    """The memory of a process; 0 if it has ended.

    Not its proportional share, which changes when other processes that use the same libraries come and go.
    """
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def replica_logs(application: str, deployment: str) -> list[Path]:
    """The log files of a deployment's replicas on this machine."""
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
    return sorted(folder.glob(f"replica_{application}_{deployment}_*.log"))
