"""The functions and files of minifisher that one step passes through: python benchmarks/step_walk.py.

MBF with its defaults, on a network of two Linear layers. It counts functions, methods and properties that
Python calls, without comprehensions. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import minifisher

PACKAGE = Path(minifisher.__file__).parent
WARM_UP, PERIOD = 17, 8  # two periods of T1 = 4 steps


def walked(optimizer: minifisher.MBF) -> dict[str, list[str]]:
    """File -> the functions that one step calls, in their first order."""
    calls: dict[str, list[str]] = defaultdict(list)

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname.split(".")[-1]
        if event == "call" and path.is_relative_to(PACKAGE) and not name.startswith("<"):
            place = str(path.relative_to(PACKAGE))
            if frame.f_code.co_qualname not in calls[place]:
                calls[place].append(frame.f_code.co_qualname)

    sys.setprofile(note)
    optimizer.step()
    sys.setprofile(None)
    return {place: names for place, names in calls.items() if names}


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)  # one thread divides no work
    network = nn.Sequential(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 10))
    optimizer = minifisher.MBF(network.parameters())
    steps = []
    for step in range(WARM_UP + PERIOD):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(torch.randn(64, 784)), torch.randint(10, (64,))).backward()
        if step < WARM_UP:
            optimizer.step()
        else:
            steps.append(walked(optimizer))
    for title, step in (
        ("ordinary step", min(steps, key=size)),
        ("step with statistics", max(steps, key=size)),
    ):
        print(
            json.dumps({"step": title, "functions": size(step), "files": len(step), "walk": step}, indent=1)
        )


def size(step: dict[str, list[str]]) -> int:
    return sum(map(len, step.values()))


if __name__ == "__main__":
    main()
