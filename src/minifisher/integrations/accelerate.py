"""Accelerate: `observe(optimizer, outputs)` between the forward pass and `accelerator.backward(loss)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minifisher.integrations.outputs import flat_numbers, unwrap

if TYPE_CHECKING:
    from torch import Tensor


def observe(optimizer: Any, outputs: Tensor, likelihood: str = "categorical") -> None:
    """Call `observe` of the optimizer that `accelerator.prepare` wrapped."""
    unwrap(optimizer).observe(outputs, likelihood)


def log_diagnostics(accelerator: Any, optimizer: Any, step: int) -> None:
    """Log `diagnostics(flat=True)` to the trackers of the accelerator, between `step` and `zero_grad`."""
    accelerator.log(dict(flat_numbers(unwrap(optimizer))), step=step)
