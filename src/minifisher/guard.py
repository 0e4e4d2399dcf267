"""Which layers an estimator can read, what a step must not read, and what is reported of it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minifisher.distributed.collectives import local
from minifisher.options import check_gradient

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import LayerSamples


NO_CLOSURE = (
    "{}.step() looks at the mini-batch before and after the step and needs a closure: call "
    "optimizer.step(closure), where closure() calls optimizer.zero_grad(), computes the loss, calls "
    "loss.backward() and returns the loss"
)


def check_estimators(
    method: str, estimators: Sequence[str], layers: Mapping[Layer, Mapping[str, Any]]
) -> None:
    """Raise ValueError where no layer can serve an estimator that groups ask for.

    Of the groups that want one estimator some layer must be readable; others may be norms alone.
    """
    wanting: dict[str, list[Layer]] = defaultdict(list)
    for layer, group in layers.items():
        wanting[group["fisher"]].append(layer)
    for source, members in wanting.items():
        if source != "gradient" and not any(layer.reads_samples for layer in members):
            way_out = ', or use fisher="gradient"' if "gradient" in estimators else ""
            raise ValueError(
                f"fisher={source!r} looks inside the backward pass of Linear and convolution layers and "
                f"{method} was given none ({members[0].name}: {members[0].note}); pass the nn.Module that "
                f"holds them, as the params of a group or of the optimizer{way_out}"
            )


def check_warm_start(taken: Sequence[bool]) -> None:
    """Raise ValueError where no batch of the pass was averaged."""
    if not any(taken):
        raise ValueError(
            "warm_start got no batch to average: the loader is empty or used up, or no gradient of its "
            "batches is finite; pass a loader that can be read from its beginning"
        )


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
    norms = [torch.stack([n.float() for n in _norms(tensors)]) for tensors in gradients.values()]
    return all(bool(torch.isfinite(norm.square()).all()) for norm in norms) and all(
        record.is_finite() for record in samples
    )


def _norms(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """In float32 where float16 holds the gradients: it ends at 65,504, where a norm of theirs does not."""
    halves = any(tensor.dtype == torch.float16 for tensor in tensors)
    norms: tuple[Tensor, ...] = torch._foreach_norm(tensors, dtype=torch.float32 if halves else None)
    return norms
