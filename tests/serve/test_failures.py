"""A draft that dies costs speed, never a request, and comes back; replicas are as urgent as any process."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import httpx

from specdecode.text import Tokenizer
from tests.serve.conftest import Expect, Server

PROMPT = "def read_lines(path):\n"
NUM_TOKENS = 400
BODY = {
    "model": "tiny",
    "prompt": PROMPT,
    "max_tokens": NUM_TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "speculative_decoding": {"draft": "code", "rounds": True},
}


def descendants(pid: int) -> list[int]:
    """The processes that descend from `pid`."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it may have ended in the meantime
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, frontier = [], {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found.extend(frontier)
    return found


def replicas(server: Server, deployment: str) -> list[int]:
    """The processes of the deployment's replicas."""
    name = f"ray::ServeReplica:specdecode:{deployment}"
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().decode() for pid in descendants(server.pid)}
    return [pid for pid, command in commands.items() if command.startswith(name)]


def drafted(http: httpx.Client) -> int:
    return http.post("/v1/completions", json={**BODY, "max_tokens": 8}).json()["speculative_decoding"]["num_draft_tokens"]


def test_replicas_do_not_give_way_to_other_processes(server: Server) -> None:
    for deployment in ("Target", "Router", "Draft-code"):
        for replica in replicas(server, deployment):
            assert os.getpriority(os.PRIO_PROCESS, replica) == os.getpriority(os.PRIO_PROCESS, 0)


def test_a_draft_that_is_killed_in_mid_stream(server: Server, http: httpx.Client, tokenizer: Tokenizer, expect: Expect) -> None:
    assert drafted(http) > 0
    [replica] = replicas(server, "Draft-code")
    text, rounds = "", []
    with http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            text += event["choices"][0]["text"]
            rounds.append(event["speculative_decoding"]["round"])
            if len(rounds) == 3:
                os.kill(replica, signal.SIGKILL)
    assert text == expect(tokenizer.encode(PROMPT), max_tokens=NUM_TOKENS, ignore_eos=True)
    assert rounds[0]["num_draft_tokens"] > 0
    assert any(round["num_draft_tokens"] == 0 for round in rounds)
    for _ in range(120):
        if drafted(http) > 0:
            break
        time.sleep(0.5)
    assert drafted(http) > 0
    assert replicas(server, "Draft-code") != [replica]
