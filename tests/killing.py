"""A command that is started, and killed with all its processes once something has happened."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """That of a command which starts a Ray of its own."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def kill_once(has_happened: Callable[[], bool], command: list[str], log: Path, timeout_s: float = 120.0) -> None:
    """Runs the command from the repository's root and sends SIGKILL to its process group; it must not end before."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=environment(), start_new_session=True)
        try:
            end = time.monotonic() + timeout_s
            while not has_happened():
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < end
                time.sleep(0.05)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_whole(command: list[str], timeout_s: float = 300.0) -> str:
    """Runs the command to its end, which must be a good one; returns what it printed."""
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=timeout_s, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout
