"""The most memory that a step needs beside weights, gradients and state, as a share of the weights' bytes.

Counted is what torch allocates on the CPU, each allocation and each release, as its profiler records them.
One thread: the profiler misses what another one releases.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from alternate import report
from step_time import NETWORKS, OPTIMIZERS, optimizer_alone
from torch.profiler import ProfilerActivity, profile

STEPS = 12  # three periods of the default's statistics and inverses


def peak(step: Any) -> int:
    """Bytes that are in use at most during a step, beyond what was in use before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in changes), initial=0))


def peaks(name: str, optimizer: str) -> dict[str, Any]:
    """The median and the largest peak over steps, after some that allocate the state."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]()
    step = optimizer_alone(network, OPTIMIZERS[optimizer](network))
    for _ in range(STEPS):
        step()
    weights = sum(weight.nbytes for weight in network.parameters())
    shares = sorted(peak(step) / weights for _ in range(STEPS))
    return {"median": round(shares[STEPS // 2], 4), "largest": round(shares[-1], 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["gpt2"], metavar="NETWORK")
    parser.add_argument("--optimizers", default="adamw,mbf")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optimizers = arguments.optimizers.split(",")
    report({name: {o: peaks(name, o) for o in optimizers} for name in arguments.networks})


if __name__ == "__main__":
    main()
