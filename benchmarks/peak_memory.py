"""The most memory that a step takes beside weights, gradients and state, as a share of the weights' bytes.

Linux with glibc only: the kernel keeps the highest resident memory of a process since the last reset.
"""

from __future__ import annotations

import argparse
import ctypes
from pathlib import Path
from typing import Any

import torch
from alternate import report
from step_time import NETWORKS, OPTIMIZERS, optimizer_alone

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
STEPS = 12  # three periods of the default's statistics and inverses


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def peaks(name: str, optimizer: str) -> dict[str, Any]:
    """The median and the largest peak over steps, after some that allocate the state."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]()
    step = optimizer_alone(network, OPTIMIZERS[optimizer](network))
    for _ in range(STEPS):
        step()
    weights = sum(p.nbytes for p in network.parameters())
    shares = []
    for _ in range(STEPS):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed memory stays resident and hides the peak
        RESET.write_text("5")
        before = resident("VmRSS")
        step()
        shares.append((resident("VmHWM") - before) / weights)
    return {"median": round(sorted(shares)[STEPS // 2], 4), "largest": round(max(shares), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["gpt2"], metavar="NETWORK")
    parser.add_argument("--optimizers", default="adamw,mbf")
    arguments = parser.parse_args()
    optimizers = arguments.optimizers.split(",")
    report({name: {o: peaks(name, o) for o in optimizers} for name in arguments.networks})


if __name__ == "__main__":
    main()
