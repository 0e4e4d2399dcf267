"""What a step must not read, and what is reported of it."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minifisher.arguments import check_gradient
from minifisher.distributed import local

if TYPE_CHECKING:
    from collections.abc import Iterable

    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import LayerSamples


SKIPPED = (
    "a gradient was NaN or infinite: the step was skipped, weights and curvature are as before; "
    "optimizer.skipped_steps counts on, this warning is not repeated"
)
FALLEN = (
    "the direction of a layer was not finite: it took the first-order step; raise the damping. "
    'optimizer.diagnostics()["fallbacks"] counts on, this warning is not repeated'
)
HELD = (
    "neither the direction of a layer nor its first-order step was finite: it stayed where it was and its "
    "momentum starts anew; look for weights, or a weight_decay, out of range. "
    'optimizer.diagnostics()["held_layers"] counts on, this warning is not repeated'
)


def warn_if(first: bool, message: str) -> None:
    """Warn the user who called `step`, which torch wraps, the first time that it happens."""
    if first:
        warnings.warn(message, RuntimeWarning, stacklevel=6)


def counts(entry: dict[str, Any]) -> dict[str, int]:
    """Steps, observations, and every whole number that the curvature keeps."""
    counts = {"step": 0, "observations": 0}
    for name, value in entry.items():
        if name in counts or (isinstance(value, Tensor) and value.dtype == torch.int64):
            counts[name] = int(value)
    return counts


def all_finite(layers: Iterable[Layer], samples: Iterable[LayerSamples]) -> bool:
    """Whether every gradient is finite, and so small that its square is: the curvature averages squares."""
    gradients: dict[torch.device, list[Tensor]] = defaultdict(list)
    for layer in layers:
        for parameter in layer.parameters:
            check_gradient(layer.name, parameter)
            if parameter.grad is not None:
                gradients[parameter.grad.device].append(local(parameter.grad))
    norms = [torch.stack([n.float() for n in torch._foreach_norm(tensors)]) for tensors in gradients.values()]
    return all(bool(torch.isfinite(norm.square()).all()) for norm in norms) and all(
        record.is_finite() for record in samples
    )
