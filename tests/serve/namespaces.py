"""Two machines as far as the network can tell: two namespaces of their own, with an address each, and a wire between them.

`unshare -Urnpf --mount-proc python -m tests.serve.namespaces FOLDER` runs in the first one. It makes the second one, starts a
Ray node in each, serves a target in the first with a draft in the second, and prints what it has seen.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.serve.nodes import nodes
from tests.serve.serving import field, serving, small_config

HERE, THERE = "10.77.0.1", "10.77.0.2"
PROMPT = "def read_lines(path):\n"
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "speculative_decoding": {"draft": "code"}}


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def second_namespace() -> Iterator[list[str]]:
    """What a command must begin with to run there; the wire ends with it."""
    process = subprocess.Popen(["unshare", "--net", "--kill-child", "--fork", "cat"], stdin=subprocess.PIPE)
    try:
        while Path(f"/proc/{process.pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
            time.sleep(0.01)
        there = ["nsenter", f"--net=/proc/{process.pid}/ns/net"]
        run("ip", "link", "add", "name", "here", "type", "veth", "peer", "name", "there", "netns", str(process.pid))
        for prefix, name, address in (([], "here", HERE), (there, "there", THERE)):
            for change in (
                ("address", "add", f"{address}/24", "dev", name),
                ("link", "set", name, "up"),
                ("link", "set", "lo", "up"),
            ):
                run(*prefix, "ip", *change)
        yield there
    finally:
        process.kill()
        process.wait()


@contextmanager
def node(prefix: list[str], address: str, log: Path) -> Iterator[None]:
    """A Ray node in the second namespace."""
    ray = str(Path(sys.executable).parent / "ray")
    resources = ["--num-cpus=1", "--num-gpus=1", '--resources={"draft_gpu": 1}', f"--object-store-memory={80 << 20}"]
    command = [*prefix, ray, "start", f"--address={address}", f"--node-ip-address={THERE}", *resources, "--block"]
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            yield
        finally:
            process.terminate()


def connections(pid: int) -> list[str]:
    """The far ends of the TCP connections of a process's namespace."""
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    ends = [line.split()[2].partition(":") for line in lines if line.split()[3] == "01"]
    return [f"{'.'.join(str(byte) for byte in reversed(bytes.fromhex(host)))}:{int(port, 16)}" for host, _, port in ends]


def change(args: dict[str, Any]) -> None:
    """One target, and a draft on the only node that has its resource."""
    args["target"]["deployment"] = {"ray_actor_options": {"num_cpus": 0.2}}
    options = {"num_cpus": 0.1, "num_gpus": 1, "resources": {"draft_gpu": 1}}
    args["drafts"]["code"] = {"model": "tiny/draft-code", "deployment": {"ray_actor_options": options}}


def main() -> None:
    """Prints a line of JSON: where the draft was leased, who is connected to whom, and what was answered."""
    folder = Path(sys.argv[1])
    with (
        second_namespace() as there,
        nodes(folder / "nodes.txt", num_cpus=2, node_ip_address=HERE) as cluster,
        node(there, cluster.address, folder / "node.txt"),
        serving(folder, small_config(change), {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}) as server,
    ):
        # Each node shows the lines of all, as they have one folder for them.
        lease = server.wait_for_lines("draft code: leased at", timeout_s=60)[0]
        placed = server.wait_for_lines("model=tiny/draft-code placed")[0]
        answer = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60).json()
        seen = {
            "lease": lease.rpartition(" at ")[2],
            "placed": field(placed, "address"),
            "connections": connections(server.pid),
            "answer": answer,
        }
        print(json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
