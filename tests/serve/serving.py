"""Servers of a test's own, which it may break: started as a user starts one, on a port of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.serve.conftest import CONFIG, ROOT
from tests.serve.test_failures import descendants

CPU_SHARE = {"ray_actor_options": {"num_cpus": 0.2}}
Change = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Serving:
    """A server that runs.

    Attributes:
        url: where it answers.
        pid: the process that everything else of it descends from.
        log: the file of what it printed.
    """

    url: str
    pid: int
    log: Path

    def replicas(self, deployment: str) -> list[int]:
        """The processes of a deployment's replicas."""
        name = f"ray::ServeReplica:specdecode:{deployment}"
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in descendants(self.pid)}
        return [pid for pid, command in commands.items() if command.startswith(name)]

    @property
    def decoders(self) -> list[int]:
        """The processes that decode, one of each target."""
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in descendants(self.pid)}
        return [pid for pid, command in commands.items() if "\0serve.host\0" in command]

    def lines(self, *parts: str) -> list[str]:
        """The lines of its log that hold all of the parts."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if all(part in line for part in parts)]

    def wait_for_lines(self, *parts: str, number: int = 1, timeout_s: float = 15) -> list[str]:
        """The same once there are so many."""
        end = time.monotonic() + timeout_s
        while len(found := self.lines(*parts)) < number:
            assert time.monotonic() < end, f"{parts}: {number} lines expected, got {found}"
            time.sleep(0.05)
        return found

    def wait_for_targets(self, number: int, timeout_s: float = 150) -> None:
        """Returns once so many targets are there, and each of them has answered a request."""
        end = time.monotonic() + timeout_s
        while True:
            targets = self.replicas("Target")
            if len(targets) == number and all(self.lines(f"Target pid={pid})", "CALL generate OK") for pid in targets):
                return
            assert time.monotonic() < end, f"{number} targets expected, got {targets}"
            httpx.post(f"{self.url}/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1}, timeout=60)

    def wait_until_serving(self, timeout_s: float = 150) -> None:
        """Returns once `/health` answers 200."""
        end = time.monotonic() + timeout_s
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < end, self.log.read_text(errors="replace")[-4000:]
            time.sleep(0.2)


def small_config(change: Change | None = None) -> dict[str, Any]:
    """The embedded deployment with one local draft, and two targets, changed by `change(args)`."""
    values: dict[str, Any] = yaml.safe_load((ROOT / CONFIG).read_text())
    args = values["applications"][0]["args"]
    args["drafts"] = {"generic": {"model": "tiny/draft-generic", "placement": "local"}, "lookup": {"method": "ngram"}}
    args["target"]["engine"] = {"draft_length": "fixed"}
    args["target"]["deployment"] = {**CPU_SHARE, "num_replicas": 2}
    if change is not None:
        change(args)
    return values


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(folder: Path, values: dict[str, Any], environment: dict[str, str] | None = None) -> Iterator[Serving]:
    """Serves a configuration until the block ends; the process must end well then."""
    config, log, port = folder / "serve.yaml", folder / "log.txt", free_port()
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "specdecode.cli", "serve", "--config", str(config), "--port", str(port)]
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # Ray joins lines that several workers print alike.
    inherited |= {"RAY_DEDUP_LOGS": "0", **(environment or {})}
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=inherited)
    server = Serving(f"http://127.0.0.1:{port}", process.pid, log)
    try:
        server.wait_for_lines("endpoint   ", timeout_s=240)
        server.wait_until_serving()
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=120)
    assert status == 0, log.read_text(errors="replace")[-4000:]


def field(line: str, name: str) -> str:
    """The value of name=value in a log line."""
    found = re.search(rf"\b{name}=(\S+)", line)
    assert found, line
    return found.group(1)


def logged_at(line: str) -> float:
    """When a line was logged, in seconds since the epoch."""
    found = re.search(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3})", line)
    assert found, line
    return time.mktime(time.strptime(found.group(1), "%Y-%m-%d %H:%M:%S")) + int(found.group(2)) / 1000
