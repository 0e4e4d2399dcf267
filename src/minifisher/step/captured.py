"""The step of the recipe without a question to the host: for CUDA graphs, and for `torch.compile(opt.step)`.

Counts are tensors, every branch is a selection on the device, and there is no schedule: statistics and
inverses are computed in every step. If a gradient is not finite, state and weights are selected from before
the step. A matrix that Cholesky cannot factorise is not tried again with more damping: its layer takes the
first-order step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minifisher.curvature import Measures, NoCurvature
from minifisher.statistics.records import BatchGradient
from minifisher.step.first_order import graft_length, look_ahead, masks_of_steps, measure

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from minifisher.curvature import Plan
    from minifisher.step.first_order import Growth
    from minifisher.step.layer_stack import Enrolled, LayerStack


def check_capturable(members: Iterable[Enrolled], options: Mapping[str, Any]) -> None:
    """Raise ValueError where a recorded step could not be the step that was asked for."""
    members = list(members)
    devices = sorted({str(member.layer.weight.device) for member in members})
    alone = all(member.placement.alone for member in members)
    if len(devices) > 1 or not alone:
        place = "in several processes" if not alone else f"on {' and '.join(devices)}"
        raise ValueError(f"capturable=True records one device in one process, these parameters are {place}")
    for member in members:
        obstacle = _obstacle(member.plan, options)
        if obstacle:
            raise ValueError(f"capturable=True and {member.layer.name}: {obstacle}")


def _obstacle(plan: Plan, options: Mapping[str, Any]) -> str:
    if options["fisher"] != "gradient":
        return f'a recorded step reads gradients alone, got fisher={options["fisher"]!r}: use "gradient"'
    if options["adaptive_damping"]:
        return "adaptive_damping=True compares losses on the host: set one of the two to False"
    if plan.statistics_every != 1 or plan.inverse_every != 1:
        return (
            f"a recorded step has no schedule, got statistics_every={plan.statistics_every} and "
            f"inverse_every={plan.inverse_every}: set both to 1"
        )
    if not (plan.curvature.capturable or isinstance(plan.curvature, NoCurvature)):
        return (
            f"the curvature chosen for it ({plan.structure}) decides on the host: "
            "that of MBF with power=1 and Cholesky does not, where output_power is 0 or 1"
        )
    return ""


def take_captured_step(
    stacks: Sequence[LayerStack],
    gradients: Sequence[Tensor],
    scale: Tensor | None,
    overflow: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Step on D of every stack; returns the steps skipped (0 or 1) and the layers that fell back, [].

    `scale` is what a GradScaler multiplied the loss by, `overflow` is positive where it found an infinity.
    Such a step is left out, too, but not counted as skipped.
    """
    if scale is not None:
        gradients = [gradient / scale for gradient in gradients]
    of_gradients = torch.stack([torch.linalg.vector_norm(gradient).float() for gradient in gradients])
    finite = torch.isfinite(of_gradients.square()).all()
    overflowed = torch.zeros_like(finite) if overflow is None else overflow.sum() != 0
    usable = finite & ~overflowed
    fallbacks = [_step(stack, gradient, usable) for stack, gradient in zip(stacks, gradients, strict=True)]
    return (~finite & ~overflowed).long(), torch.stack(fallbacks).sum()


def _step(stack: LayerStack, gradient: Tensor, usable: Tensor) -> Tensor:
    before = {name: tensor.clone() for name, tensor in stack.state.items()}
    taken = stack.step + usable
    observations = stack.observations + (usable & (stack.curvature.needs is not None))
    # In float64: in float32 the first bias corrections would be off by 6e-5.
    steps = _directions(stack, gradient, taken.double(), observations.double())
    update, fallbacks = _with_length(stack, *steps)
    for name, tensor in stack.state.items():
        tensor.copy_(torch.where(usable, tensor, before[name]))
    stack.step.copy_(taken)
    stack.observations.copy_(observations)
    stays = _apply(stack, update, usable)
    return torch.where(usable, fallbacks + stays, 0)


def _directions(
    stack: LayerStack, gradient: Tensor, taken: Tensor, observations: Tensor
) -> tuple[Tensor, Tensor, Tensor, Growth]:
    """The direction P N, the first-order step whose length it is to have, M, and how D has grown."""
    options, curvature, graft, mu = stack.options, stack.curvature, stack.graft, stack.options["momentum"]
    if curvature.needs is not None:
        # As LayerStack.corrected_decay; rounding makes it the plain decay long before the count saturates.
        share = (1 - options["curvature_decay"]) / (1 - options["curvature_decay"] ** observations)
        curvature.observe(stack.state, BatchGradient(gradient), 1 - share)
        curvature.refresh(stack.state, options["damping"])
    gradient = stack.with_decay(gradient)
    graft.update(stack.state, gradient, stack.lengths, taken, mu, with_slope=False)
    momentum = stack.state["momentum"] if mu else gradient
    first_order = graft.step(stack.state, momentum, taken, mu)
    growth: Growth = None, None  # which equal norms do not read
    if stack.measures_slope:
        growth = graft.growth(stack.state, gradient, stack.lengths, taken)
    if curvature.needs is None:
        return first_order, first_order, momentum, growth
    ahead = look_ahead(gradient, momentum, options, curvature, taken)
    return curvature.precondition(stack.state, ahead, options["damping"]), first_order, momentum, growth


def _with_length(
    stack: LayerStack, direction: Tensor, first_order: Tensor, momentum: Tensor, growth: Growth
) -> tuple[Tensor, Tensor]:
    """The direction with its length, or the first-order step if that is not finite; and how many layers.

    Layers that stay, because neither is finite, are counted, too.
    """
    sloped, lengths = momentum if stack.measures_slope else None, stack.lengths
    # By torch: no graph can record compiled loops.
    measures, of_first_order = (
        measure(step, sloped, lengths, by_torch=True) for step in (direction, first_order)
    )
    of_first_order = Measures(*of_first_order[:2], *growth)
    rescales = stack.curvature.needs is not None and stack.graft.rescales
    length = graft_length(measures, of_first_order, rescales, stack.options["length_limit"])
    usable, fallen, frozen = masks_of_steps(measures, of_first_order, length)
    count = (fallen | frozen).view(len(stack.layers), -1).any(1).sum()
    length, usable, frozen = (each.view(stack.length_shape) for each in (length, usable, frozen))
    return torch.where(usable, direction * length, first_order.masked_fill(frozen, 0)), count


def _apply(stack: LayerStack, update: Tensor, usable: Tensor) -> Tensor:
    """W <- (1 - lr weight_decay) W - lr update; returns how many parameters stay, not to become infinite."""
    options = stack.options
    decay = options["weight_decay"] if options["decoupled_weight_decay"] else 0.0
    stays = torch.zeros_like(usable, dtype=torch.int64)
    for parameter, part in stack.local_parameters(update):
        moved = parameter * (1 - options["lr"] * decay) if decay else parameter
        moved, moves = moved - options["lr"] * part, usable
        if part.dtype != parameter.dtype:  # float16 ends where the update in float32 does not
            moved = moved.to(parameter.dtype)
            in_range = (moved.isfinite() | ~parameter.isfinite()).all()
            moves, stays = usable & in_range, stays + ~in_range
        parameter.copy_(torch.where(moves, moved, parameter))
    return stays
