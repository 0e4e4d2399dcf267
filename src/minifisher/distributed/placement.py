"""Where the curvature of each layer lives when processes train together, and what they exchange of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from minifisher.curvature import Curvature, Plan
from minifisher.distributed.collectives import (
    ALL_RANKS,
    cuts,
    is_distributed,
    local,
    placed,
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


# Nanoseconds, fitted to what benchmarks/owner_cost.py measured for every method (docs/scaling.md): they only
# decide who owns what, and all ranks must decide alike, so nobody measures at run time.
_PER_LAYER = 25_000.0
_PER_NUMBER = 0.65  # of the state: blocks of own rows are read more than computed with
_PER_PRODUCT = 0.0125
_PER_MATRIX = 550.0  # decompositions of many small blocks
_PER_CUBE = 0.03


@dataclass(frozen=True)
class Elsewhere(Curvature):
    """A curvature that another rank owns: nothing is kept here, the direction arrives from there."""

    needs: type[Statistics] | None

    def init(self, layer: Layer) -> State:
        """Nothing."""
        return {}

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """Nothing."""

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """Room for the direction."""
        return torch.zeros_like(direction)


@dataclass(frozen=True)
class Exchange:
    """A tensor of the state that ranks sum up after each of them observed: share times what each has."""

    name: str
    groups: tuple[Any, ...]
    share: float


@dataclass(frozen=True)
class Seat:
    """Where a layer's curvature lives, as this process sees it."""

    plan: Plan
    """With the curvature that is kept here."""
    observer: Curvature
    """What observes here: the curvature, also where it is another rank's."""
    owner: int | None = None
    """The only rank that keeps it; None: every rank does, of its piece of the weight."""
    cuts: tuple[tuple[int, Any], ...] = ()
    """Dimensions along which the weight is cut, with the ranks that hold the pieces."""
    exchanged: tuple[Exchange, ...] = ()
    sums_gradients: bool = False
    """Whether ranks exchange the samples' mean gradient, before it is observed."""

    @property
    def alone(self) -> bool:
        """Whether nothing of it is exchanged."""
        return self.owner is None and not (self.cuts or self.exchanged or self.sums_gradients)

    @property
    def groups(self) -> tuple[Any, ...]:
        """The ranks that hold the other pieces."""
        return tuple(group for _, group in self.cuts)


def piece(layer: Layer) -> Layer:
    """What this process holds of a layer."""
    if not is_distributed(layer.weight):
        return layer
    bias = layer.bias if layer.bias is None else local(layer.bias).detach()
    return replace(layer, weight=local(layer.weight).detach(), bias=bias)


def take_seats(
    method: str, plans: Mapping[Layer, Plan], groups: Mapping[Layer, Any], shard_curvature: bool
) -> dict[Layer, Seat]:
    """A seat for every layer, the same on all ranks but for which are theirs."""
    owners: dict[Layer, int | None] = dict.fromkeys(plans)
    # Group by group: one that is added later moves nothing that has a state already.
    for group in {id(group): group for group in groups.values()}.values() if shard_curvature else ():
        movable = [layer for layer in plans if groups[layer] is group and _can_move(layer, plans[layer])]
        costs = [cost(layer, plans[layer]) for layer in movable]
        owners.update(zip(movable, assign_owners(costs, world_size()), strict=True))
    return {layer: _seat(method, layer, plan, owners[layer]) for layer, plan in plans.items()}


def _can_move(layer: Layer, plan: Plan) -> bool:
    curvature = plan.curvature
    return not (is_distributed(layer.weight) or curvature.needs is None or curvature.reads_caches)


def cost(layer: Layer, plan: Plan) -> float:
    """Nanoseconds of one core a step: of the direction, and of a refresh every T2 steps, read off the state.

    `benchmarks/owner_cost.py` measures beside it.
    """
    state = _blank(plan.curvature, layer).values()
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


def _seat(method: str, layer: Layer, plan: Plan, owner: int | None) -> Seat:
    curvature = plan.curvature
    if is_distributed(layer.weight):
        return _seat_of_piece(method, layer, plan)
    if world_size() == 1 or curvature.needs is None:
        return Seat(plan, curvature)
    exchanged: tuple[Exchange, ...] = ()
    sums_gradients = False
    if curvature.needs is not BatchGradient:
        sums_gradients = curvature.reads_mean_gradient
        names = () if sums_gradients else _averages(curvature, layer)
        exchanged = tuple(Exchange(name, ALL_RANKS, 1 / world_size()) for name in names)
    held = plan if owner in (None, rank()) else replace(plan, curvature=Elsewhere(curvature.needs))
    return Seat(held, curvature, owner, (), exchanged, sums_gradients)


def _averages(curvature: Curvature, layer: Layer) -> tuple[str, ...]:
    state = _blank(curvature, piece(layer))
    names = curvature.averages
    return tuple(
        name for name in state if state[name].is_floating_point() and (names is None or name in names)
    )


def _blank(curvature: Curvature, layer: Layer) -> State:
    """A fresh state without memory."""
    return curvature.init(replace(layer, weight=layer.weight.detach().to("meta")))


# ---- pieces of a weight ----


def _seat_of_piece(method: str, layer: Layer, plan: Plan) -> Seat:
    if plan.curvature.needs not in (None, BatchGradient):
        raise ValueError(
            f"{layer.name} is cut over processes, and what one of them sees of its samples is not enough for "
            f'{method}: under fully_shard and tensor parallelism there is MBF with fisher="gradient"; for '
            "every method there is DistributedDataParallel, where shard_curvature=True spreads the curvature"
        )
    lines = cuts(layer.weight)
    if layer.bias is not None and cuts(layer.bias) != lines:
        raise ValueError(f"the bias of {layer.name} is cut otherwise than its weight: pass fold_bias=False")
    curvature = shard(method, layer, plan, piece(layer).shape)
    exchanged = tuple(
        exchange
        for name in _averages(curvature, layer)
        if (exchange := _exchange_of_piece(method, layer, plan, name, lines)).groups
    )
    return Seat(replace(plan, curvature=curvature), curvature, None, lines, exchanged)


def shard(method: str, layer: Layer, plan: Plan, shape: torch.Size) -> Curvature:
    """The curvature of a piece of the layer of this shape."""
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


def _exchange_of_piece(
    method: str, layer: Layer, plan: Plan, name: str, lines: Iterable[tuple[int, Any]]
) -> Exchange:
    """Over the ranks among which the weight is cut and this tensor is not, by their share of the weight."""
    share, groups = 1.0, []
    for dimension, group in lines:
        if cut_dimension(method, layer, plan, name, dimension) is None:
            groups.append(group)
            share *= (piece(layer).weight.shape[dimension] / layer.weight.shape[dimension]) if share else 0.0
    return Exchange(name, tuple(groups), share)


def cut_dimension(method: str, layer: Layer, plan: Plan, name: str, dimension: int) -> int | None:
    """Along which dimension a tensor of the state is cut when the weight is cut along `dimension`."""
    nothing = torch.Size(0 if axis == dimension else n for axis, n in enumerate(layer.shape))
    whole = _blank(shard(method, layer, plan, layer.shape), piece(layer))[name].shape
    empty = _blank(shard(method, layer, plan, nothing), piece(layer))[name].shape
    return next((axis for axis, (n, m) in enumerate(zip(whole, empty, strict=True)) if n != m), None)


def whole_shape(layer: Layer, plan: Plan, name: str) -> tuple[torch.Size, dict[int, int | None]]:
    """Of a tensor of the state, put together from its pieces; and where it is cut as the weight is cut.

    Rows that stand for kernels are unfolded into (out, in), for pieces of a weight end between its outputs.
    """
    shape = _blank(shard("", layer, plan, layer.shape), piece(layer))[name].shape
    if plan.curvature.shard(layer.shape) is None:
        return shape, {}  # one process, and a method that needs the whole weight
    axes = {dimension: cut_dimension("", layer, plan, name, dimension) for dimension in placed(layer.weight)}
    outputs, inputs = (*layer.weight.shape, 1, 1)[:2]
    if layer.weight.ndim > 2 and inputs > 1 and 0 in axes.values() and shape[0] == outputs * inputs:
        shape = torch.Size((outputs, inputs, *shape[1:]))
        axes = {dimension: axis if axis is None else dimension for dimension, axis in axes.items()}
    return shape, axes
