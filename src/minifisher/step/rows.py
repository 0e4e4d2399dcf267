"""Some rows of a large layer at a time: the direction of all would take as much memory as the weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minifisher.curvature import LARGEST_COPY, FusedDirection
from minifisher.step.entries import PARAMETER_SHAPED
from minifisher.step.layer_stack import LayerStack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from minifisher.curvature import State


def is_large(stack: LayerStack) -> bool:
    """Whether the step of a stack is taken some rows at a time."""
    piece, *others = stack.pieces
    return (
        isinstance(stack.curvature, FusedDirection)
        and piece.shape.numel() > LARGEST_COPY
        and not others
        and stack.is_plain
        and stack.rows is not None
        and piece is stack.layers[0]  # else this process holds a part of the weight already
    )


def by_rows(stack: LayerStack) -> Iterator[LayerStack]:
    """Stacks of some of the rows of a large layer, as views: its weight is cut between blocks."""
    assert isinstance(stack.curvature, FusedDirection)
    (weight,), unit = stack.parameters, stack.curvature.rows_of_block
    step = unit * max(1, LARGEST_COPY // (2 * unit * weight[0].numel()))
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield _of_rows(stack, weight, rows, slice(rows.start // unit, rows.stop // unit))


def _of_rows(stack: LayerStack, weight: Tensor, rows: slice, blocks: slice) -> LayerStack:
    part = weight.detach()[rows]
    part.grad = weight.grad if weight.grad is None else weight.grad[rows]
    curvature = stack.curvature.shard(part.shape)
    assert curvature is not None, "the weight is cut between blocks"
    placement = replace(stack.placement, plan=replace(stack.plan, curvature=curvature))
    layers = [replace(stack.layers[0], weight=part)]
    counts = stack.step, stack.observations, stack.missed
    state = _state_of_rows(stack, rows, blocks)
    return RowsOfStack(layers, stack.options, placement, state, stack.entries, *counts, whole=stack)


def _state_of_rows(stack: LayerStack, rows: slice, blocks: slice) -> State:
    """The state as views: of the rows, of their blocks, or all of it where rows share it."""
    axes = stack.curvature.state_axes(0)

    def cut(name: str) -> tuple[slice, ...]:
        if name in PARAMETER_SHAPED:
            return (rows,)
        axis = axes[name]
        return () if axis is None else (*(slice(None),) * axis, blocks)

    return {name: tensor[cut(name)] for name, tensor in stack.state.items()}


@dataclass(eq=False)
class RowsOfStack(LayerStack):
    """Some rows of a stack's only layer, as views of it."""

    whole: LayerStack | None = None

    def renew_curvature(self) -> int:
        """That of the whole stack."""
        assert self.whole is not None
        return self.whole.renew_curvature()
