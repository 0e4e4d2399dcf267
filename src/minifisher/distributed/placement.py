"""Where the curvature of each layer lives when several processes train together, and what they exchange.

Under DistributedDataParallel every rank has all weights, and each keeps every curvature, or with
`shard_curvature` only those that it owns. Under fully_shard and tensor parallelism a weight is cut along a
dimension, and every rank keeps the curvature of its piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from minifisher.curvature import Curvature, Plan
from minifisher.distributed.collectives import (
    ALL_RANKS,
    cut_dimensions,
    cuts,
    is_distributed,
    local,
    piece_units,
    rank,
    world_size,
)
from minifisher.distributed.ownership import assign_owners
from minifisher.statistics.records import BatchGradient

if TYPE_CHECKING:
    from torch import Tensor

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import Statistics


# Nanoseconds, fitted to the measurements of benchmarks/owner_cost.py (docs/scaling.md). They only decide who
# owns what. They are constants, not measured at run time, because all ranks must decide alike.
_PER_LAYER = 25_000.0
_PER_NUMBER = 0.65  # of the state: for many small blocks, reading takes longer than computing
_PER_PRODUCT = 0.0125
_PER_MATRIX = 550.0  # decompositions of many small blocks
_PER_CUBE = 0.03


@dataclass(frozen=True)
class RemoteCurvature(Curvature):
    """A curvature that another rank owns: this rank keeps no state of it and receives its directions."""

    needs: type[Statistics] | None

    def init(self, layer: Layer) -> State:
        """Empty."""
        return {}

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """Nothing to average here."""

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """Memory for the direction that will be received."""
        return torch.zeros_like(direction)


@dataclass(frozen=True)
class SharedAverage:
    """A tensor of the state that ranks sum after each has observed; a rank brings share x its own."""

    name: str
    groups: tuple[Any, ...]
    share: float


@dataclass(frozen=True)
class Placement:
    """Where a layer's curvature lives, as this process sees it."""

    plan: Plan
    """The plan, with the curvature that this process keeps."""
    observer: Curvature
    """The curvature that observes here, even if another rank owns it."""
    owner: int | None = None
    """The only rank that keeps the curvature; None if every rank keeps that of its piece of the weight."""
    cuts: tuple[tuple[int, Any], ...] = ()
    """Dimensions along which the weight is cut, each with the group of ranks that hold the pieces."""
    averages: tuple[SharedAverage, ...] = ()
    sums_gradients: bool = False
    """Whether the mean gradient of the samples is summed over ranks before it is observed."""

    @property
    def exchanges(self) -> bool:
        """Whether an observation is shared with other ranks."""
        return bool(self.averages) or self.sums_gradients

    @property
    def alone(self) -> bool:
        """Whether nothing is exchanged at all."""
        return self.owner is None and not (self.cuts or self.exchanges)

    @property
    def groups(self) -> tuple[Any, ...]:
        """The groups of ranks that hold the other pieces."""
        return tuple(group for _, group in self.cuts)


def local_part(layer: Layer) -> Layer:
    """The part of a layer that this process holds."""
    if not is_distributed(layer.weight):
        return layer
    bias = layer.bias if layer.bias is None else local(layer.bias).detach()
    return replace(layer, weight=local(layer.weight).detach(), bias=bias)


def with_piece_units(layer: Layer) -> Layer:
    """The layer, which knows how processes share its weight."""
    return replace(layer, piece_units=piece_units(layer.weight)) if is_distributed(layer.weight) else layer


def place_layers(
    method: str,
    plans: Mapping[Layer, Plan],
    groups: Mapping[Layer, Any],
    shard_curvature: bool,
    placed: Mapping[Layer, int | None],
) -> dict[Layer, Placement]:
    """The placement of every layer; all ranks agree on the owners.

    `placed` has the owners of layers that may have a state already: they keep them.
    """
    owners: dict[Layer, int | None] = {layer: placed.get(layer) for layer in plans}
    # Group by group, so that layers are owned alike however many groups were given at once.
    for group in {id(group): group for group in groups.values()}.values() if shard_curvature else ():
        movable = [
            layer
            for layer in plans
            if groups[layer] is group and layer not in placed and _can_move(layer, plans[layer])
        ]
        costs = [cost(layer, plans[layer]) for layer in movable]
        owners.update(zip(movable, assign_owners(costs, world_size()), strict=True))
    return {layer: _placement(method, layer, plan, owners[layer]) for layer, plan in plans.items()}


def _can_move(layer: Layer, plan: Plan) -> bool:
    curvature = plan.curvature
    return not (is_distributed(layer.weight) or curvature.needs is None or curvature.reads_caches)


def cost(layer: Layer, plan: Plan) -> float:
    """Nanoseconds of one core a step, for directions and a refresh every T2 steps, from the state's shapes.

    `benchmarks/owner_cost.py` compares it with measured times.
    """
    state = meta_state(plan.curvature, layer).values()
    matrices = [tensor for tensor in state if tensor.ndim > 1 and tensor.shape[-2] == tensor.shape[-1] > 1]
    numbers = sum(tensor.numel() for tensor in state)
    widths = sum(tensor.shape[-1] for tensor in matrices)
    count = sum(tensor.shape[:-2].numel() for tensor in matrices)
    cubes = sum(tensor.numel() * tensor.shape[-1] for tensor in matrices)
    refresh = _PER_MATRIX * count + _PER_CUBE * cubes
    return (
        _PER_LAYER
        + _PER_NUMBER * numbers
        + _PER_PRODUCT * layer.shape.numel() * widths
        + refresh / plan.inverse_every
    )


def _placement(method: str, layer: Layer, plan: Plan, owner: int | None) -> Placement:
    curvature = plan.curvature
    if is_distributed(layer.weight):
        return _placement_of_piece(method, layer, plan)
    if world_size() == 1 or curvature.needs is None:
        return Placement(plan, curvature)
    averages: tuple[SharedAverage, ...] = ()
    sums_gradients = False
    if curvature.needs is not BatchGradient:
        sums_gradients = curvature.reads_mean_gradient
        names = () if sums_gradients else _averages(curvature, layer)
        averages = tuple(SharedAverage(name, ALL_RANKS, 1 / world_size()) for name in names)
    held = plan if owner in (None, rank()) else replace(plan, curvature=RemoteCurvature(curvature.needs))
    return Placement(held, curvature, owner, (), averages, sums_gradients)


def _averages(curvature: Curvature, layer: Layer) -> tuple[str, ...]:
    state = meta_state(curvature, local_part(layer))
    names = curvature.averages
    return tuple(
        name for name in state if state[name].is_floating_point() and (names is None or name in names)
    )


def meta_state(curvature: Curvature, layer: Layer) -> State:
    """A fresh state that has shapes but no memory."""
    return curvature.init(replace(layer, weight=layer.weight.detach().to("meta")))


# ---- pieces of a weight ----


def _placement_of_piece(method: str, layer: Layer, plan: Plan) -> Placement:
    if plan.curvature.needs not in (None, BatchGradient):
        raise ValueError(
            f"{layer.name} is cut over processes, and what one of them sees of its samples is not enough for "
            f'{method}: under fully_shard and tensor parallelism there is MBF with fisher="gradient"; for '
            "every method there is DistributedDataParallel, where shard_curvature=True spreads the curvature"
        )
    lines = cuts(layer.weight)
    if layer.bias is not None and cuts(layer.bias) != lines:
        raise ValueError(f"the bias of {layer.name} is cut otherwise than its weight: pass fold_bias=False")
    curvature = shard(method, layer, plan, local_part(layer).shape)
    whole = shard(method, layer, plan, layer.shape)
    averages = tuple(
        average
        for name in _averages(curvature, layer)
        if (average := _average_over_pieces(layer, whole, name, lines)).groups
    )
    return Placement(replace(plan, curvature=curvature), curvature, None, lines, averages)


def shard(method: str, layer: Layer, plan: Plan, shape: torch.Size) -> Curvature:
    """The curvature of a piece of the layer, of this shape."""
    if shape == layer.shape:
        return plan.curvature.shard(shape) or plan.curvature
    curvature = plan.curvature.shard(shape)
    if curvature is None:
        raise ValueError(
            f"{method} cannot precondition the piece {tuple(shape)} of {layer.name} {tuple(layer.shape)} "
            "on its own: MBF can, where the weight is cut along its first dimension, or along another one at "
            'block borders (block_size a divisor of the piece, and inverse="cholesky" where blocks that no '
            "rows share are too many for one tile); for every method there is "
            "DistributedDataParallel, where shard_curvature=True spreads the curvature"
        )
    return curvature


def _average_over_pieces(
    layer: Layer, curvature: Curvature, name: str, lines: Iterable[tuple[int, Any]]
) -> SharedAverage:
    """Over the ranks among which the weight is cut but this tensor is not, by their shares of the weight."""
    share, groups = 1.0, []
    for dimension, group in lines:
        if curvature.state_axes(dimension)[name] is None:
            groups.append(group)
            held = local_part(layer).weight.shape[dimension] / layer.weight.shape[dimension]
            share *= held if share else 0.0
    return SharedAverage(name, tuple(groups), share)


def whole_shape(layer: Layer, plan: Plan, name: str) -> tuple[torch.Size, dict[int, int | None]]:
    """The shape of a tensor of the state for the whole weight, and where it is cut as the weight is cut.

    Rows that stand for kernels become two dimensions (out, in), because a weight is cut between its outputs.
    """
    curvature = shard("", layer, plan, layer.shape)
    shape = meta_state(curvature, local_part(layer))[name].shape
    if plan.curvature.shard(layer.shape) is None:
        return shape, {}  # one process, and a method that needs the whole weight
    axes = {dimension: curvature.state_axes(dimension)[name] for dimension in cut_dimensions(layer.weight)}
    outputs, inputs = (*layer.weight.shape, 1, 1)[:2]
    if layer.weight.ndim > 2 and inputs > 1 and 0 in axes.values() and shape[0] == outputs * inputs:
        shape = torch.Size((outputs, inputs, *shape[1:]))
        axes = {dimension: axis if axis is None else dimension for dimension, axis in axes.items()}
    return shape, axes
