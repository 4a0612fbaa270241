"""A target of two processes in a placement group of its own: it answers as one process does, and is replaced as a whole."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from specdecode.text import Tokenizer
from tests.serve.conftest import Expect
from tests.serve.nodes import nodes
from tests.serve.serving import Serving, field, serving, small_config
from tests.serve.test_failures import descendants
from tests.serve.test_placement import NUM_TOKENS, PROMPT, stream


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """On a node of two GPUs, as far as Ray can tell."""
    folder = tmp_path_factory.mktemp("two_processes")

    def change(args: dict[str, Any]) -> None:
        args["target"] |= {"tp": 2, "deployment": {"ray_actor_options": {"num_cpus": 0.2}}}
        args["router"]["failover_timeout_s"] = 300.0

    with (
        nodes(folder / "nodes.txt", num_cpus=2, num_gpus=2) as cluster,
        serving(folder, small_config(change), {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}) as server,
    ):
        yield server


def ranks() -> list[int]:
    """The further processes of the target."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in descendants(os.getpid())}
    return [pid for pid, command in commands.items() if command.startswith(b"ray::Rank")]


def test_each_process_has_a_gpu_of_its_own(two_processes: Serving) -> None:
    placed = two_processes.lines("model=tiny/target placed")
    assert sorted(field(line, "gpus") for line in placed) == ["0", "1"]
    assert len(ranks()) == 1


def test_two_processes_answer_as_one(two_processes: Serving, tokenizer: Tokenizer, expect: Expect) -> None:
    answer = stream(two_processes, "generic", "alone", lambda _: None)
    assert answer == expect(tokenizer.encode(PROMPT), max_tokens=NUM_TOKENS, ignore_eos=True)


def test_a_process_that_is_killed_takes_its_replica_along_and_no_request(
    two_processes: Serving, tokenizer: Tokenizer, expect: Expect
) -> None:
    begun = threading.Event()

    def seen(number: int) -> None:
        if number == 10:
            begun.set()

    [before] = ranks()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(stream, two_processes, "generic", f"killed-{number}", seen) for number in range(4)]
        assert begun.wait(60)
        os.kill(before, signal.SIGKILL)
        texts = [answer.result() for answer in answers]
    assert texts == [expect(tokenizer.encode(PROMPT), max_tokens=NUM_TOKENS, ignore_eos=True)] * 4
    two_processes.wait_for_lines("the model is lost, and this replica with it: ")
    [after] = ranks()
    assert after != before
