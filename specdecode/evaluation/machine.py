"""Nothing in, what figures were measured on out: versions, processor, memory, GPUs."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def versions() -> dict[str, str]:
    """What was run."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("specdecode", "torch", "transformers")},
    }


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "processor": _processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def device_name(device: torch.device) -> str:
    """A GPU by its name, a CPU by its processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
