"""Plain numbers about the last step, for loggers of metrics: `diagnostics(flat=True)`.

A step computes none of them. They are worked out from the state after the step and from `.grad`: P N once
more, and the eigenvalues of a few small matrices. So they cost about as much as a step without statistics.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from minifisher.curvature import Measures
from minifisher.step.first_order import graft_length, look_ahead, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from minifisher.step.layer_stack import LayerStack

_MOST_MATRICES = 16  # of one tensor of the state
_WIDEST = 64  # of a wider matrix the first rows and columns are read


class StepClock:
    """The seconds of the last step without statistics and of the last one with them; NaN before the first."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"seconds_step": math.nan, "seconds_statistics_step": math.nan}

    @contextmanager
    def timing(self, stacks: Sequence[LayerStack]) -> Iterator[None]:
        """Time the body: a step of these stacks. The first step of all, which has none, reads statistics."""
        due = not stacks or any(stack.statistics_due for stack in stacks)
        start = time.perf_counter()
        yield
        self.seconds["seconds_statistics_step" if due else "seconds_step"] = time.perf_counter() - start


def diagnostics_of_step(
    stacks: Iterable[LayerStack], groups: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """Damping, eigenvalues, and cosine and length of the last step over all layers; NaN if unknown.

    For a layer with the gradient D, the weight W and the step lr length P N: the cosine between D and P N,
    and the ratio lr length |P N| / |W|. Weight decay and `kl_clip` are left out.
    """
    dampings = [float(group["damping"]) for group in groups]
    stacks = list(stacks)
    with torch.no_grad():
        steps = [row for stack in stacks if _has_step(stack) for row in _steps(stack)]
        ranges = [row for stack in stacks if stack.observations for row in _eigenvalue_ranges(stack)]
    cosines, ratios = zip(*steps, strict=True) if steps else ((), ())
    smallest, largest, conditions = zip(*ranges, strict=True) if ranges else ((), (), ())
    return {
        "damping_min": min(dampings),
        "damping_max": max(dampings),
        "eigenvalue_min": _over(min, smallest),
        "eigenvalue_max": _over(max, largest),
        "condition_max": _over(max, conditions),
        "cosine_mean": _over(_mean, cosines),
        "cosine_min": _over(min, cosines),
        "step_ratio_mean": _over(_mean, ratios),
        "step_ratio_max": _over(max, ratios),
    }


def _has_step(stack: LayerStack) -> bool:
    """Whether this process holds all that the direction is made from, and has taken a step with it."""
    kept = [*stack.graft.state_names, *(["momentum"] if stack.options["momentum"] else [])]
    has_gradient = any(parameter.grad is not None for parameter in stack.parameters)
    return stack.placement.alone and bool(stack.step) and has_gradient and stack.state.keys() >= {*kept}


def _steps(stack: LayerStack) -> Iterator[tuple[float, float]]:
    """Of every layer: the cosine between gradient and step, and the ratio of step to weight length."""
    gradient, weights, layers = stack.gradient(), stack.weights(), len(stack.layers)
    step = _step(stack, gradient)
    inner = (gradient * step).reshape(layers, -1).sum(1)
    step_norm, slope, size = (
        measure(tensor, None, layers).norm.double() for tensor in (step, gradient, weights)
    )
    cosines = (inner / (step_norm * slope)).tolist()
    ratios = (float(stack.options["lr"]) * step_norm / size).tolist()
    yield from zip(cosines, ratios, strict=True)


def _step(stack: LayerStack, gradient: Tensor) -> Tensor:
    """length P N of the last step, as `minifisher.step.recipe` made it."""
    state, curvature, options, mu = stack.state, stack.curvature, stack.options, stack.options["momentum"]
    joined = stack.joined(gradient)
    momentum = state["momentum"] if mu else joined
    first_order = stack.graft.step(state, momentum, stack.step, mu)
    if not stack.observations:
        return first_order
    ahead = look_ahead(joined, momentum, options, curvature, stack.step)
    direction = curvature.precondition(state, ahead, options["damping"])
    sloped = momentum if stack.measures_slope else None
    of_step, of_first_order = (measure(step, sloped, stack.lengths) for step in (direction, first_order))
    growth = stack.graft.growth(state, joined, stack.lengths, stack.step)
    of_first_order = Measures(*of_first_order[:2], *growth)
    length = graft_length(of_step, of_first_order, stack.graft.rescales, options["length_limit"])
    return direction * length.view(stack.length_shape)


def _eigenvalue_ranges(stack: LayerStack) -> Iterator[tuple[float, float, float]]:
    """Smallest and largest eigenvalue, and their largest ratio, of each tensor of matrices.

    At most 16 matrices of a tensor are read, and of each at most 64 rows and columns, whose eigenvalues lie
    between those of the whole matrix. Entries that are zero in all gradients so far do not count.
    """
    for tensor in stack.curvature.matrices(stack.state):
        matrices = tensor[..., :_WIDEST, :_WIDEST].reshape(-1, *tensor[0, ..., :_WIDEST, :_WIDEST].shape[-2:])
        matrices = matrices[:: max(1, math.ceil(len(matrices) / _MOST_MATRICES))].double().cpu()
        diagonal = matrices.diagonal(dim1=-2, dim2=-1)
        dead = diagonal == 0
        mean = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True)
        # A matrix with the mean of the others on its diagonal there has no eigenvalue out of their range.
        matrices = matrices + torch.diag_embed(torch.where(dead, mean, 0))
        usable = torch.isfinite(matrices).flatten(1).all(1)
        if usable.any():
            eigenvalues = torch.linalg.eigvalsh(matrices[usable])
            smallest, largest = eigenvalues[:, 0], eigenvalues[:, -1]
            floor = largest * torch.finfo(tensor.dtype).eps  # below it there is rounding only
            condition = largest / torch.maximum(smallest, floor)
            yield float(smallest.min()), float(largest.max()), float(condition.max())


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _over(reduce: Callable[[Sequence[float]], float], numbers: Iterable[float]) -> float:
    """Over those that are finite; NaN if there are none."""
    finite = [number for number in numbers if math.isfinite(number)]
    return float(reduce(finite)) if finite else math.nan
