"""The processor time of direction and refresh beside the formula that owners are chosen by: JSON lines.

One thread; microseconds a step. Owners only need the proportions between the layers of one optimizer, so that
`ratio`, measured over formula, may have any level and should not vary much within a method.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import minifisher
from minifisher.distributed.placement import cost
from minifisher.statistics.layers import layers_of

SHAPES = ((16, 16), (64, 64), (256, 256), (500, 784), (1024, 1024), (32, 16, 3), (64, 64, 3), (128, 128, 3))
CASES = {method: (method, {}) for method in minifisher.METHODS} | {
    "mbf own rows": ("mbf", {"share": "row"}),
    "mbf kernels": ("mbf", {"conv_blocks": "kernel"}),
}


def seconds(call: Callable[[], object], least: float = 0.15) -> float:
    call()
    count, start = 0, time.process_time()
    while time.process_time() - start < least:
        call()
        count += 1
    return (time.process_time() - start) / count


def filled(name: str, tensor: Tensor) -> Tensor:
    """A state that all verbs can work with: identities for matrices."""
    if not tensor.is_floating_point():
        return tensor
    if tensor.ndim > 1 and tensor.shape[-1] == tensor.shape[-2]:
        return torch.eye(tensor.shape[-1]).expand_as(tensor).clone()
    return torch.rand_like(tensor) + 0.1


def measure(method: str, options: dict[str, str], module: nn.Module) -> dict[str, object]:
    optimizer = minifisher.METHODS[method](module, **options)
    (layer,) = layers_of(module)
    plan = optimizer.plan(layer, optimizer.param_groups[0])
    curvature = plan.curvature
    state = {name: filled(name, tensor) for name, tensor in curvature.init(layer).items()}
    direction = torch.randn(layer.shape)
    measured = seconds(lambda: curvature.precondition(state, direction, 0.1))
    measured += seconds(lambda: curvature.refresh(state, 0.1)) / plan.inverse_every
    formula = cost(layer, plan) / 1e9
    return {
        "shape": list(layer.shape),
        "measured": round(measured * 1e6, 1),
        "formula": round(formula * 1e6, 1),
        "ratio": round(measured / formula, 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    for name, (method, options) in CASES.items():
        for shape in SHAPES:
            kind = nn.Linear if len(shape) == 2 else nn.Conv2d
            module = kind(shape[1], shape[0], *shape[2:], bias=False)
            print(json.dumps({"case": name, **measure(method, options, module)}), flush=True)


if __name__ == "__main__":
    main()
