"""The most memory that a step needs beside weights, gradients and state, as a share of the weights' bytes."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from allocations import peak
from alternate import report
from step_time import NETWORKS, OPTIMIZERS, optimizer_alone

STEPS = 12  # three periods of the default's statistics and inverses


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
    torch.set_num_threads(1)  # as `peak` needs it
    optimizers = arguments.optimizers.split(",")
    report({name: {o: peaks(name, o) for o in optimizers} for name in arguments.networks})


if __name__ == "__main__":
    main()
