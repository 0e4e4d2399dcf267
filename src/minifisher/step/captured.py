"""A step that never asks the host: for CUDA graphs, and for compilers that want the step as one graph.

The same step as `Cohort.move` and `Cohort.apply`, with counts that are tensors, every branch a selection on
the device, and no schedule: statistics and inverses every step. A gradient that is not finite changes
nothing: state and weights are selected from before. A matrix that Cholesky cannot factorise gets no further
attempts: its layer takes the first-order step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minifisher.curvature import FirstOrder
from minifisher.statistics.records import BatchGradient
from minifisher.step.first_order import GRAFTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from minifisher.curvature import Plan
    from minifisher.statistics.layers import Layer
    from minifisher.step.layer_stack import Cohort


def check_capturable(plans: Mapping[Layer, Plan], options: Mapping[str, Any], alone: bool) -> None:
    """Raise ValueError where a recorded step could not be the step that was asked for."""
    devices = sorted({str(layer.weight.device) for layer in plans})
    if len(devices) > 1 or not alone:
        place = "in several processes" if not alone else f"on {' and '.join(devices)}"
        raise ValueError(f"capturable=True records one device in one process, these parameters are {place}")
    for layer, plan in plans.items():
        obstacle = _obstacle(plan, options)
        if obstacle:
            raise ValueError(f"capturable=True and {layer.name}: {obstacle}")


def _obstacle(plan: Plan, options: Mapping[str, Any]) -> str:
    if options["fisher"] != "gradient":
        return f'a recorded step reads gradients alone, got fisher={options["fisher"]!r}: use "gradient"'
    if options["adaptive_damping"]:
        return "adaptive_damping=True compares losses on the host: set one of the two to False"
    if GRAFTS[options["graft"]].by_rows:
        return f'a recorded step has one length a layer, got graft={options["graft"]!r}: use "adam" or "sgd"'
    if plan.statistics_every != 1 or plan.inverse_every != 1:
        return (
            f"a recorded step has no schedule, got statistics_every={plan.statistics_every} and "
            f"inverse_every={plan.inverse_every}: set both to 1"
        )
    if not (plan.curvature.capturable or isinstance(plan.curvature, FirstOrder)):
        return (
            f"the curvature chosen for it ({plan.structure}) decides on the host: "
            "that of MBF with power=1 and Cholesky does not"
        )
    return ""


def take_step(
    cohorts: Sequence[Cohort], gradients: Sequence[Tensor], scale: Tensor | None, overflow: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Step on D of every cohort; returns the steps skipped (0 or 1), and the layers that fell back, [].

    `scale` is what a GradScaler multiplied the loss by, `overflow` positive where it found an infinity.
    """
    if scale is not None:
        gradients = [gradient / scale for gradient in gradients]
    norms = torch.stack([_norm(gradient, 1).float() for gradient in gradients])
    usable = torch.isfinite(norms.square()).all()
    if overflow is not None:
        usable = usable & (overflow.sum() == 0)
    fallen = [_step(cohort, gradient, usable) for cohort, gradient in zip(cohorts, gradients, strict=True)]
    return (~usable).long(), torch.stack(fallen).sum()


def _step(cohort: Cohort, gradient: Tensor, usable: Tensor) -> Tensor:
    before = {name: tensor.clone() for name, tensor in cohort.state.items()}
    taken = cohort.step + usable
    observations = cohort.observations + (usable & (cohort.plan.curvature.needs is not None))
    # In float64: in float32 the first bias corrections would be off by 6e-5.
    direction, first_order = _directions(cohort, gradient, taken.double(), observations.double())
    update, fallen = _grafted(cohort, direction, first_order)
    for name, tensor in cohort.state.items():
        tensor.copy_(torch.where(usable, tensor, before[name]))
    cohort.step.copy_(taken)
    cohort.observations.copy_(observations)
    _apply(cohort, update, usable)
    return torch.where(usable, fallen, 0)


def _directions(
    cohort: Cohort, gradient: Tensor, taken: Tensor, observations: Tensor
) -> tuple[Tensor, Tensor]:
    """The direction P M, and the first-order step whose length it is to have."""
    options, curvature, graft = cohort.options, cohort.plan.curvature, GRAFTS[cohort.options["graft"]]
    if curvature.needs is not None:
        # The decay of Cohort.corrected_decay; it rounds to the plain one long before the count saturates.
        share = (1 - options["curvature_decay"]) / (1 - options["curvature_decay"] ** observations)
        curvature.observe(cohort.state, BatchGradient(gradient), 1 - share)
        curvature.refresh(cohort.state, options["damping"])
    gradient = cohort.with_decay(gradient)
    graft.advance(cohort.state, gradient, len(cohort.layers), taken, options["momentum"])
    momentum = cohort.past(gradient)
    first_order = graft.step(cohort.state, momentum, taken, options["momentum"])
    if curvature.needs is None:
        return first_order, first_order
    return curvature.precondition(cohort.state, momentum, options["damping"]), first_order


def _grafted(cohort: Cohort, direction: Tensor, first_order: Tensor) -> tuple[Tensor, Tensor]:
    """The direction with its length, the first-order step where it is not finite; the layers where."""
    layers = len(cohort.layers)
    norm, length = (_norm(stack, layers) for stack in (direction, first_order))
    rescales = cohort.plan.curvature.needs is not None and GRAFTS[cohort.options["graft"]].rescales
    factor = length / norm if rescales else torch.ones_like(norm)
    usable = torch.isfinite(norm + factor)
    # Where the first-order step is no number either the layer stays, and counts as well.
    fallback = torch.where(torch.isfinite(length), first_order, 0)
    update = torch.where(usable, direction * factor, fallback)
    return update, (~usable & (length != 0)).sum()


def _norm(stack: Tensor, layers: int) -> Tensor:
    """Of every layer, [] or [layers, 1, ...]."""
    norm: Tensor = torch.linalg.vector_norm(
        stack, dim=tuple(range(1, stack.ndim)) if layers > 1 else None, keepdim=layers > 1
    )
    return norm


def _apply(cohort: Cohort, update: Tensor, usable: Tensor) -> None:
    """W <- (1 - lr weight_decay) W - lr update."""
    options = cohort.options
    decay = options["weight_decay"] if options["decoupled_weight_decay"] else 0.0
    for parameter, part in cohort.moving(update):
        moved = parameter * (1 - options["lr"] * decay) if decay else parameter
        parameter.copy_(torch.where(usable, moved - options["lr"] * part, parameter))
