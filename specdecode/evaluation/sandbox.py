"""A Python program that nobody has read in, whether it ran to its end out; see `jail.py` for what it cannot do meanwhile."""

import json
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from specdecode.config import StrictModel
from specdecode.errors import ConfigError

_JAIL = Path(__file__).with_name("jail.py")
_SPARE_S = 10.0  # for the interpreter to start, on a busy machine


class SandboxConfig(StrictModel):
    """Where programs are run, and how much they may take."""

    isolation: Literal["namespaces", "limits"] = Field(
        default="namespaces",
        description="namespaces of their own, without network and with a file system that they cannot write; or, where the "
        "machine allows no namespaces, limits alone: for programs that are trusted to mean no harm",
    )
    timeout_s: float = Field(default=5.0, gt=0)
    memory_mb: int = Field(default=1024, gt=0)
    disk_mb: int = Field(default=64, gt=1, description="of its folder, which is in memory")
    num_processes: int = Field(default=16, gt=0, description="processes and threads")


@dataclass(frozen=True)
class Outcome:
    """What came of a program: whether it ran to its last line without an error, and what it said last."""

    is_passed: bool
    is_late: bool
    output: str


def run_program(program: str, config: SandboxConfig) -> Outcome:
    """Runs a program.

    Raises:
        ConfigError: the machine does not let it be isolated.
    """
    mark = secrets.token_hex(16)  # is said after the last line: a program that exits before that has not passed
    program = f"{program}\nprint({mark!r})\n"
    with tempfile.TemporaryDirectory(prefix="specdecode-") as folder:
        settings = config.model_dump(exclude={"isolation"}) | {
            "folder": folder,
            "isolated": config.isolation == "namespaces",
        }
        command = [sys.executable, "-I", str(_JAIL), json.dumps(settings)]
        ended = subprocess.run(
            command, input=program.encode(), capture_output=True, check=False, timeout=config.timeout_s + _SPARE_S
        )
    if ended.returncode != 0:
        reason = ended.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit status {ended.returncode}"]
        raise ConfigError(f"sandbox: programs cannot be run: {reason[0]}")
    told = json.loads(ended.stdout)
    if "refused" in told:
        raise ConfigError(
            f"sandbox: expected a machine that allows namespaces to users, but {told['refused']}: allow them, or set "
            "isolation: limits for programs that mean no harm"
        )
    is_done = told["status"] == 0 and not told["is_late"] and mark in told["output"]
    return Outcome(is_done, told["is_late"], told["output"].replace(f"{mark}\n", ""))
