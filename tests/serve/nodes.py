"""A cluster of several nodes on this machine, each with an address and GPUs of its own, as far as Ray can tell.

It runs in a process of its own, so that Ray is neither imported nor configured in that of the tests: `python -m
tests.serve.nodes` starts the head and then does what the lines of its standard input say.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.serve.conftest import ROOT
from tests.serve.serving import free_port
from tests.serve.test_failures import descendants


@dataclass(frozen=True)
class Node:
    """A node that runs.

    Attributes:
        id: by which Ray knows it.
        address: where it says that it is.
        pid: of its raylet, from which all its workers descend.
    """

    id: str
    address: str
    pid: int

    def replicas(self, deployment: str) -> list[int]:
        """The processes of a deployment's replicas here."""
        name = f"ray::ServeReplica:specdecode:{deployment}"
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in descendants(self.pid)}
        return [pid for pid, command in commands.items() if command.startswith(name)]


class Nodes:
    """All nodes together; the first one is the head."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._orders: IO[str] = process.stdin
        self._answers: IO[str] = process.stdout
        self.address: str = self._next()["address"]

    def add(self, **options: Any) -> Node:
        """Starts one more node; see `ray.cluster_utils.Cluster.add_node`."""
        print(json.dumps({"add": options}), file=self._orders, flush=True)
        return Node(**self._next())

    def kill(self, node: Node) -> None:
        """Ends a node as a lost machine ends."""
        print(json.dumps({"kill": node.id}), file=self._orders, flush=True)
        self._next()

    def _next(self) -> dict[str, Any]:
        for line in self._answers:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise AssertionError("the process of the nodes has ended")


@contextmanager
def nodes(log: Path, **head: Any) -> Iterator[Nodes]:
    """Starts a head node, and ends all nodes when the block ends."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "tests.serve.nodes", json.dumps(head)]
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
        ) as process,
    ):
        try:
            yield Nodes(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=60)


def main() -> None:
    """Keeps the nodes until there are no more orders."""
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 << 20}
    head = {"include_dashboard": False, "dashboard_port": free_port(), **memory, **json.loads(sys.argv[1])}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        print(json.dumps({"address": cluster.address}), flush=True)
        added = {}
        for line in sys.stdin:
            order = json.loads(line)
            if "add" in order:
                node = cluster.add_node(**memory, **order["add"])
                added[node.node_id] = node
                [raylet] = node.all_processes["raylet"]
                answer = {"id": node.node_id, "address": node.node_ip_address, "pid": raylet.process.pid}
            else:
                cluster.remove_node(added.pop(order["kill"]), allow_graceful=False)
                answer = {}
            print(json.dumps(answer), flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
