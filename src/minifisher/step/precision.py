"""Mixed precision around an optimizer: the scale of the loss undone, autocast kept out of the step."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor
    from torch.optim import Optimizer


def overflowed(optimizer: Optimizer) -> bool:
    """Whether a GradScaler drives this step and found a gradient that is not finite."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def unscale(optimizer: Optimizer) -> None:
    """Divides every `.grad` by the scale, unless `scaler.unscale_` did it before."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, 1 / scale.item())


def loss_scale(optimizer: Any, captured: bool) -> float:
    """What the loss was multiplied by before its backward pass; `captured`: whether it has to be known."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        return scale.item()
    if optimizer.loss_scale is not None:
        return float(optimizer.loss_scale())
    if captured and hasattr(optimizer, "found_inf"):
        raise ValueError(
            'fisher="empirical" reads output gradients, which carry the scale of the loss, and after '
            "scaler.unscale_(optimizer) torch does not tell it: set optimizer.loss_scale = scaler.get_scale"
        )
    return 1.0


def full_precision(groups: Iterable[Mapping[str, Any]]) -> ExitStack:
    """No autocast on the devices of the parameters, should `step` be called under it.

    Inverses and roots of what it rounds to half precision are those of another matrix.
    """
    stack = ExitStack()
    for kind in {parameter.device.type for group in groups for parameter in group["params"]}:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
