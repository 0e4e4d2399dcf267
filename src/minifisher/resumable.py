"""The half of an optimizer that outlives the process: state dicts, copies and pickles."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from minifisher.distributed.collectives import is_distributed
from minifisher.distributed.placement import Seat, take_seats
from minifisher.state.checkpoint import indices, merged_groups, read_entries, whole_entries, without_stacks
from minifisher.statistics.capture import Captures

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from minifisher.curvature import Plan
    from minifisher.statistics.layers import Layer
    from minifisher.step.layer_stack import Cohort


class Resumable(Optimizer, ABC):
    """Holds what a state is made of; the engine that changes it is CurvatureOptimizer."""

    _layers: dict[Layer, dict[str, Any]]
    _plans: dict[Layer, Plan]
    _seats: dict[Layer, Seat]
    _active: list[Layer]
    _cohorts: list[Cohort]
    _captures: Captures

    @abstractmethod
    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """The curvature of one layer under the options of its parameter group, and why it was chosen."""

    @abstractmethod
    def _initialise(self, layers: Iterable[Layer]) -> None:
        """Make the state of layers that have none."""

    @abstractmethod
    def _new_captures(self) -> Captures:
        """The captures that the plans need."""

    @abstractmethod
    def _arm(self) -> None:
        """Hooks on where the coming step reads statistics."""

    def _take_seats(self, plans: Mapping[Layer, Plan], groups: Mapping[Layer, Any]) -> dict[Layer, Seat]:
        return take_seats(type(self).__name__, plans, groups, self.defaults["shard_curvature"])

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with an entry for every trainable parameter, also where no gradient came yet."""
        trainable = (layer for layer in self._layers if any(p.requires_grad for p in layer.parameters))
        self._initialise(trainable)
        packed = super().state_dict()
        keys = indices(self.param_groups, packed)
        for layer, plan in self._plans.items():
            if layer.weight in self.state and is_distributed(layer.weight):
                whole = whole_entries(layer, plan, self.state)
                packed["state"].update({keys[parameter]: entry for parameter, entry in whole.items()})
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()`; ValueError, and nothing changed, where it does not fit."""
        groups = merged_groups(self.param_groups, state_dict, self.defaults)
        renewed = {id(old): new for old, new in zip(self.param_groups, groups, strict=True)}
        options = {layer: renewed[id(group)] for layer, group in self._layers.items()}
        plans = {layer: self.plan(layer, group) for layer, group in options.items()}
        seats = self._take_seats(plans, options)
        entries = read_entries(seats, options, state_dict["state"], indices(groups, state_dict))
        # Without the state, which torch would cast to the parameter's dtype.
        super().load_state_dict({**state_dict, "state": {}})
        self.param_groups[:] = groups
        self._layers, self._plans, self._seats = options, plans, seats
        self.state.update(entries)
        self._active = []
        self._captures = self._new_captures()
        self._arm()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_layers", "_plans", "_complete", "_fallbacks", "_held", "_skipped", "loss_scale", "_modules")
        state = {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}
        return {**state, "state": without_stacks(self.state)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_layers" in state:  # a copy, not torch's load_state_dict
            self._active, self._cohorts, self._captures = [], [], Captures({}, 0)
            self._seats = self._take_seats(self._plans, self._layers)
            self._captures = self._new_captures()
            self._arm()
