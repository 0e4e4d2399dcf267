"""The machine that a run was measured on: hardware, versions, commit, and what else it was doing."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

BUSY = 0.5
"""How far the load average may exceed the number of cores: the suite's own logging adds a little."""


def machine() -> dict[str, Any]:
    """The machine that the seconds were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@cache
def provenance() -> dict[str, Any]:
    """The machine, its name, minifisher's version and its commit."""
    return {
        **machine(),
        "host": platform.node(),
        "minifisher": metadata.version("minifisher"),
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the source code, with "+changes" if it was edited; "not a checkout" without one."""
    here = Path(__file__)
    try:
        _git(here.parent, "ls-files", "--error-unmatch", here.name)  # an installed copy may lie in another's
        return _git(here.parent, "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return "not a checkout"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def load_average() -> float:
    """How many processes wanted to compute at once, on average over the last minute."""
    return float(psutil.getloadavg()[0])


def is_busy(load: float) -> bool:
    """Whether more processes wanted to compute than there are cores."""
    return load > (os.cpu_count() or 1) + BUSY


def warnings() -> list[str]:
    """Why seconds that are measured now would mislead; empty on a quiet machine."""
    load, threads, cores = load_average(), torch.get_num_threads(), os.cpu_count() or 1
    found = []
    if is_busy(load):
        found.append(
            f"the machine is busy: {load:.1f} processes want its {cores} cores. Compare by --epochs: "
            "a ranking by seconds may turn round"
        )
    if threads > cores:
        found.append(f"{threads} threads share {cores} cores: use --threads {cores} or fewer")
    return found


def started(pid: int) -> float | None:
    """When the process with that number started, or None if there is none. A zombie is dead."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
