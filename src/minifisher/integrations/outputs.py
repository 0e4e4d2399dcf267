"""The optimizer inside the wrapper of a trainer, and labels drawn when a module returns its prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # as torch.optim: the public one imports the compiler at once

from minifisher.optimizer import CurvatureOptimizer
from minifisher.statistics.second_pass import refuse_missing_closure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.utils.hooks import RemovableHandle


def unwrap(optimizer: Any) -> CurvatureOptimizer:
    """The optimizer of minifisher in wrappers that keep it as `.optimizer`: those of accelerate and Fabric.

    Raises TypeError if there is none.
    """
    found = optimizer
    # A wrapper may pretend to be of the class that it wraps: an inner optimizer counts first.
    while isinstance(getattr(found, "optimizer", None), torch.optim.Optimizer):
        found = found.optimizer
    if not isinstance(found, CurvatureOptimizer):
        raise TypeError(
            f"got an optimizer of class {type(found).__name__}: pass one of minifisher, or a wrapper of it"
        )
    return found


def draws_labels(optimizer: CurvatureOptimizer) -> bool:
    """Whether it takes labels from the model, so that `observe` must be called."""
    return any(group["fisher"] in ("sampled", "exact") for group in optimizer.param_groups)


def refuse_trainer_without_closure(optimizer: CurvatureOptimizer) -> None:
    """Raise TypeError, before the first batch, if `step` needs a closure: this trainer passes none."""
    # Two things evaluate a batch twice.
    if optimizer._secant_layers or any(group["adaptive_damping"] for group in optimizer.param_groups):
        refuse_missing_closure(type(optimizer).__name__)


def observe_outputs(
    module: nn.Module,
    optimizer: Any,
    likelihood: str = "categorical",
    read: Callable[[Any], Tensor] | None = None,
) -> RemovableHandle:
    """Call `optimizer.observe` whenever the module returns a prediction in training; for trainers.

    `read` returns the logits or means from what the module returns; None: the tensor itself, or its `logits`.
    Pass the module itself, not DistributedDataParallel around it. `remove()` of the result ends it.
    """
    inner, read = unwrap(optimizer), read or prediction

    # Compiled, the extra backward pass would become part of the model.
    @_disable_dynamo
    def observe(module: nn.Module, arguments: Any, outputs: Any) -> None:
        if torch.is_grad_enabled() and module.training:
            inner.observe(read(outputs), likelihood)

    return module.register_forward_hook(observe)


def prediction(outputs: Any) -> Tensor:
    """The tensor itself, or the `logits` of the outputs of transformers; TypeError if there are none."""
    by_name = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    found = outputs if isinstance(outputs, Tensor) else by_name
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the module returned a {type(outputs).__name__} without logits: pass read=, a function that "
            "returns the prediction from it"
        )
    return found


def flat_numbers(optimizer: CurvatureOptimizer, prefix: str = "minifisher") -> Mapping[str, float]:
    """`diagnostics(flat=True)` under `prefix/key`."""
    return {f"{prefix}/{key}": float(value) for key, value in optimizer.diagnostics(flat=True).items()}
