"""The exchanges of one step of processes that train together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from minifisher.curvature import Measures
from minifisher.distributed.collectives import (
    ALL_RANKS,
    copy_from_owners,
    local,
    rank,
    sum_over_ranks,
    world_size,
)
from minifisher.statistics.records import BatchGradient, Secant, mean_gradient
from minifisher.step.adaptive_damping import as_number, damping_factor, dtype_of_loss, within_bounds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from torch import Tensor

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import LayerSamples
    from minifisher.step.layer_stack import Enrolled, LayerStack
    from minifisher.step.update import Update

    Samples = Mapping[Layer, LayerSamples]
    Sums = Sequence[tuple[Tensor, tuple[Any, ...]]]  # each with the groups that it is summed over


@dataclass(eq=False)
class Together:
    """Several processes: averages, directions and lengths are exchanged, and all step or none.

    Under fully_shard each rank holds pieces of the gradient, and only their owner sees that one is not
    finite. The ranks of `groups` tell each other so with one number, which is sent along with the first sum
    of the step. If the step has no sum before the directions, they are computed first, and everything is
    restored if a gradient was not finite on some rank.
    """

    finite: bool
    """Whether this rank's gradients are finite."""
    groups: tuple[Any, ...] = ()
    """The ranks that hold other pieces of the weights; empty where every rank knows all gradients."""
    zero: AbstractSet[Layer] = frozenset()
    """The layers whose gradient is zero on all ranks."""
    zero_pieces: Mapping[Layer, bool] = field(default_factory=dict)
    """Whether the gradient is zero in the piece that this rank holds, of every layer that is cut."""
    asks_for_zero: bool = False
    """Whether such a layer is about to be observed."""
    all_ask_for_zero: bool = field(init=False, default=False)
    """Whether all ranks ask: no step was taken then, and `knowing_zero` can."""
    one_by_one = fuses = False
    _stops: bool = field(init=False)
    """Whether the step is not taken, as far as this rank knows."""
    _must_ask: bool = field(init=False)
    _snapshots: list[_Snapshot] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._stops, self._must_ask = not self.finite, bool(self.groups)

    @classmethod
    def of_step(
        cls,
        finite: bool,
        members: Sequence[Enrolled],
        zero: set[Layer],
        is_due: Callable[[Layer], bool],
    ) -> Together:
        """For a step of these layers; `zero`: those whose gradient, or the piece of it here, is zero."""
        groups = dict.fromkeys(group for member in members for group in member.placement.groups)
        cut = [member.layer for member in members if member.placement.cuts]
        pieces = {layer: layer in zero for layer in cut}
        asks = any(is_due(layer) for layer in cut if layer in zero)
        return cls(finite, tuple(groups), zero.difference(cut), pieces, asks)

    def knowing_zero(self) -> Together:
        """The same, after the ranks have told each other which layers are zero in all pieces."""
        device = local(next(iter(self.zero_pieces)).weight).device
        others = torch.tensor([float(not zero) for zero in self.zero_pieces.values()], device=device)
        sum_over_ranks([(others, self.groups)])
        counts = zip(self.zero_pieces, others.tolist(), strict=True)
        agreed = {layer for layer, count in counts if not count}
        return Together(self.finite, self.groups, self.zero | agreed)

    @classmethod
    def over_all_ranks(cls, finite: bool, stacks: Sequence[LayerStack]) -> Together:
        """For a warm start, in which no rank averages a batch in if one of them cannot."""
        exchanges = any(stack.placement.exchanges for stack in stacks)
        return cls(finite, ALL_RANKS if exchanges else ())

    # ---- statistics ----

    def average_statistics(
        self,
        stacks: Sequence[LayerStack],
        gradients: Sequence[Tensor],
        samples: Samples,
        decays: Sequence[float | None],
    ) -> bool:
        """Each rank observes its samples, and a sum combines them; False, and no change, if not finite.

        If a number is not finite on one rank, the sum is not finite on any rank: all skip the step.
        """
        due = [
            (stack, gradient, decay)
            for stack, gradient, decay in zip(stacks, gradients, decays, strict=True)
            if decay is not None
        ]
        if self._must_ask and not any(stack.placement.exchanges for stack, _, _ in due):
            self._snapshots = [_Snapshot(stack) for stack in stacks]
        own, shared, fresh = _statistics(due, samples)
        if (fresh or shared) and not self._sum(_sums(fresh, shared)):
            return False
        if self._stops and not self._must_ask:  # the other ranks know already
            return False
        for stack, state in fresh:
            _take_over(stack, state)
        for stack, gradient, decay in shared:
            stack.curvature.observe(stack.state, BatchGradient(gradient), decay)
        for stack, gradient, decay in own:
            stack.observe(stack.curvature, stack.state, gradient, samples, decay)
        for stack, _, _ in due:
            stack.observations += 1
        return True

    def _sum(self, sums: Sums) -> bool:
        """Sum over ranks, the first time with their flags; whether all sums are finite."""
        if not self._must_ask:
            return sum_over_ranks(sums)
        like = sums[0][0] if sums else torch.empty(0, dtype=torch.float64, device=self._device)
        # One; infinity where a gradient is not finite; and zero, which only a sum of zeros keeps, to ask for
        # zero gradients.
        flag = like.new_tensor([math.inf if self._stops else float(not self.asks_for_zero)])
        finite = sum_over_ranks([*sums, (flag, self.groups)])
        self.all_ask_for_zero = not bool(flag)
        self._stops, self._must_ask = self.all_ask_for_zero or not bool(torch.isfinite(flag)), False
        return finite

    @property
    def _device(self) -> torch.device | None:
        stacks = [snapshot.stack for snapshot in self._snapshots]
        return stacks[0].pieces[0].weight.device if stacks else None

    # ---- directions and lengths ----

    def agree(self, updates: Sequence[Update]) -> bool:
        """Receive directions, sum norms and slopes; False, and all as before, if the step stops."""
        owned = [update for update in updates if update.stack.placement.owner is not None]
        copy_from_owners([(update.direction, _owner(update)) for update in owned])
        cut = [update for update in updates if update.stack.length_groups]
        sums = [_additive(update) for update in cut]
        self._sum([(numbers, u.stack.length_groups) for numbers, u in zip(sums, cut, strict=True)])
        if self._stops:
            for snapshot in self._snapshots:
                snapshot.restore()
            return False
        for numbers, update in zip(sums, cut, strict=True):
            _take_measures(update, numbers)
        return True


def _additive(update: Update) -> Tensor:
    """What was measured of direction and first-order step, norms squared, [2 to 6, lengths]."""
    numbers = [
        number.double() if index else number.double().square()
        for measures in (update.measured(), update.first_order)
        for index, number in enumerate(measures)
        if number is not None
    ]
    return torch.stack(numbers)


def _take_measures(update: Update, sums: Tensor) -> None:
    """Measure by what `_additive` gave, summed over the ranks."""
    dtype, of_direction = update.first_order.norm.dtype, 1 if update.first_order.slope is None else 2
    update.measures, update.first_order = (
        Measures(numbers[0].sqrt().to(dtype), *numbers[1:].to(dtype))
        for numbers in (sums[:of_direction], sums[of_direction:])
    )


def _owner(update: Update) -> int:
    owner = update.stack.placement.owner
    assert owner is not None
    return owner


class _Snapshot:
    """What the coming step of a stack writes before all ranks have said that they can take it."""

    def __init__(self, stack: LayerStack) -> None:
        self.stack = stack
        self._counts = stack.step, stack.observations, stack.missed
        writes_all = stack.statistics_due or stack.refresh_due(observed=False)
        self._tensors = {
            name: tensor.clone()
            for name, tensor in stack.state.items()
            if writes_all or name in stack.parameter_shaped
        }

    def restore(self) -> None:
        """Put all of it back."""
        self.stack.step, self.stack.observations, self.stack.missed = self._counts
        for name, tensor in self._tensors.items():
            self.stack.state[name].copy_(tensor)


# ---- what a rank brings to the statistics ----

_Due = tuple["LayerStack", "Tensor", float]


def _statistics(
    due: Sequence[_Due], samples: Samples
) -> tuple[list[_Due], list[_Due], list[tuple[LayerStack, State]]]:
    """Split by what is exchanged: nothing, the mean gradient of the samples, or the averages themselves."""
    own, shared, fresh = [], [], []
    for stack, gradient, decay in due:
        if stack.placement.averages:
            fresh.append((stack, _share_of_averages(stack, gradient, samples, decay)))
        elif stack.placement.sums_gradients:
            shared.append((stack, _share_of_gradient(stack, samples), decay))
        else:
            own.append((stack, gradient, decay))
    return own, shared, fresh


def _sums(fresh: Sequence[tuple[LayerStack, State]], shared: Sequence[_Due]) -> Sums:
    averages = [(state[a.name], a.groups) for stack, state in fresh for a in stack.placement.averages]
    return averages + [(gradient, ALL_RANKS) for _, gradient, _ in shared]


def _share_of_averages(stack: LayerStack, gradient: Tensor, samples: Samples, decay: float) -> State:
    """This rank's share of the new averages, apart from the state; the shares of all ranks sum to them.

    Where one rank owns the curvature it alone has the old averages X: it brings decay X for all ranks.
    """
    placement = stack.placement
    if placement.owner in (None, rank()):
        times = 1 if placement.owner is None else world_size()
        state = {**stack.state, **{name: stack.state[name] * times for name in _written(stack)}}
    else:
        state = _initial(stack)
    stack.observe(placement.observer, state, gradient, samples, decay)
    for average in placement.averages:
        # NOTE the mean over no rows at all is NaN.
        tensor = state[average.name]
        state[average.name] = tensor.mul_(average.share) if average.share else tensor.zero_()
    return state


def _written(stack: LayerStack) -> list[str]:
    """The tensors of the state that `observe` writes: exchanged ones, and those of this rank alone."""
    exchanged = {average.name for average in stack.placement.averages}
    return [name for name in stack.state if name in exchanged.union(stack.placement.observer.averages or ())]


def _initial(stack: LayerStack) -> State:
    """A state before the first observation, of the stack's shapes."""
    fresh = stack.placement.observer.init(stack.layers[0])
    if len(stack.layers) == 1:
        return fresh
    return {name: torch.stack([tensor] * len(stack.layers)) for name, tensor in fresh.items()}


def _take_over(stack: LayerStack, state: State) -> None:
    for name in _written(stack):
        stack.state[name].copy_(state[name])


def _share_of_gradient(stack: LayerStack, samples: Samples) -> Tensor:
    """This rank's share of the mean over all samples of all ranks, [layers, *layer.shape] for several."""
    means = [mean_gradient(samples[layer], layer.shape) / world_size() for layer in stack.layers]
    return torch.stack(means) if len(means) > 1 else means[0]


# ---- after the step ----


def adapt_damping(groups: Iterable[dict[str, Any]], before: Any, after: Any, predicted_changes: Sums) -> None:
    """Adapt the damping of the groups that ask for it, by the losses before and after the step."""
    adaptive = [group for group in groups if group["adaptive_damping"]]
    if world_size() > 1:
        before, after = mean_over_ranks((before, after), predicted_changes[0][0].device)
    factor = damping_factor(before, after, total(predicted_changes), adaptive[0]["maximize"])
    for group in adaptive:
        group["damping"] = within_bounds(group["damping"] * factor)


def total(parts: Sums) -> float:
    """The sum of numbers [], each summed over its groups first."""
    numbers = [(part.detach().double().clone(), groups) for part, groups in parts]
    sum_over_ranks(numbers)
    return sum(float(number) for number, _ in numbers)


def mean_over_ranks(losses: Sequence[Any], device: torch.device) -> list[Tensor]:
    """The mean of each loss [] over the batches of all ranks, in the dtype of the loss.

    It is summed on the device of the weights: a process group may know no other.
    """
    means = [torch.as_tensor(as_number(loss), dtype=torch.float64, device=device) for loss in losses]
    sum_over_ranks([(mean.div_(world_size()), ALL_RANKS) for mean in means])
    return [mean.to(dtype_of_loss(loss)) for mean, loss in zip(means, losses, strict=True)]


def mean_secants(secants: Mapping[Layer, Secant]) -> dict[Layer, Secant]:
    """How far the means over the samples of all ranks moved."""
    ranks = world_size()
    means = {layer: (s.output_change / ranks, s.gradient_change / ranks) for layer, s in secants.items()}
    sum_over_ranks([(tensor, ALL_RANKS) for pair in means.values() for tensor in pair])
    return {layer: Secant(*pair) for layer, pair in means.items()}
