"""Which layers step together: their state before the first step, and its slices of one stack afterwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minifisher.distributed.collectives import local
from minifisher.distributed.placement import piece
from minifisher.step.first_order import GRAFTS
from minifisher.step.layer_stack import OF_PARAMETER_SHAPE, Cohort, kept

if TYPE_CHECKING:
    from minifisher.curvature import Plan
    from minifisher.distributed.placement import Seat
    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import LayerSamples

    Options = dict[str, Any]
    Entries = Mapping[Tensor, dict[str, Any]]

# Stacking copies the gradients once; above this many entries a call of its own costs less than the copy.
_STACKED_ENTRIES = 65_536

_COUNTS = frozenset({"step", "observations"})


def initial_state(layer: Layer, plan: Plan, options: Options) -> dict[Tensor, dict[str, Any]]:
    """The entries of a layer's parameters in the optimizer's state before the first step."""
    names = [*(["momentum"] if options["momentum"] else []), *GRAFTS[options["graft"]].state_names]
    entries: dict[Tensor, dict[str, Any]] = {
        parameter: {
            "step": _no_count(parameter, options),
            **{name: torch.zeros_like(local(parameter), dtype=kept(parameter.dtype)) for name in names},
        }
        for parameter in layer.parameters
    }
    entries[layer.weight].update(
        observations=_no_count(layer.weight, options), **plan.curvature.init(piece(layer))
    )
    return entries


def add_momentum(layer: Layer, entries: Entries) -> None:
    """M = 0 for a layer that went without so far, as a scheduler of the momentum may have it."""
    for parameter in layer.parameters:
        zeros = torch.zeros_like(local(parameter), dtype=kept(parameter.dtype))
        entries[parameter].setdefault("momentum", zeros)


def _no_count(parameter: Tensor, options: Options) -> int | Tensor:
    return torch.zeros((), dtype=torch.int64, device=parameter.device) if options["capturable"] else 0


def _own(count: int | Tensor) -> int | Tensor:
    return count.clone() if isinstance(count, Tensor) else count


def form_cohorts(
    layers: Iterable[Layer],
    seats: Mapping[Layer, Seat],
    options: Mapping[Layer, Options],
    entries: Entries,
    samples: Mapping[Layer, LayerSamples],
) -> list[Cohort]:
    """Put equal layers together; their entries in the optimizer's state become views of the stack.

    Layers that `samples` tell of observe more than their equals from now on, and go apart.
    """
    members: dict[object, list[Layer]] = defaultdict(list)
    for layer in layers:
        key = _key(layer, seats[layer], options[layer], entries[layer.weight])
        members[key, layer in samples].append(layer)
    return [_cohort(equal, seats[equal[0]], options[equal[0]], entries) for equal in members.values()]


def _key(layer: Layer, seat: Seat, options: Options, entry: dict[str, Any]) -> object:
    weight = layer.weight
    if weight.numel() > _STACKED_ENTRIES:
        return layer
    history = int(entry["step"]), int(entry["observations"])
    return seat, layer.shape, layer.bias is None, weight.dtype, weight.device, id(options), history


def _cohort(layers: list[Layer], seat: Seat, options: Options, entries: Entries) -> Cohort:
    entry = entries[layers[0].weight]
    # Layers that part company go on counting on their own.
    step, observations = _own(entry["step"]), _own(entry["observations"])
    cohort = Cohort(layers, seat.plan, options, {}, step, observations, seat)
    for name in entry:
        if name in OF_PARAMETER_SHAPE:
            cohort.state[name] = cohort.gather(entries[parameter][name] for parameter in cohort.parameters)
            for parameter, view in zip(cohort.parameters, cohort.scatter(cohort.state[name]), strict=True):
                entries[parameter][name] = view
        elif name not in _COUNTS:
            tensors = [entries[layer.weight][name] for layer in layers]
            cohort.state[name] = torch.stack(tensors) if len(tensors) > 1 else tensors[0]
            for index, layer in enumerate(layers):
                entries[layer.weight][name] = cohort._of_layer(index, cohort.state)[name]
    return cohort
