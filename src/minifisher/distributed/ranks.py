"""The step of processes that train together: the same loop in phases, with exchanges between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from minifisher.distributed.collectives import ALL_RANKS, fill_in, rank, sum_over, world_size
from minifisher.statistics.records import BatchGradient, Secant, mean_gradient
from minifisher.step.layer_stack import OF_PARAMETER_SHAPE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import LayerSamples
    from minifisher.step.layer_stack import Cohort, Move

    Samples = Mapping[Layer, LayerSamples]
    Decays = Sequence[float | None]  # one a cohort; None where it is not due
    Sums = Sequence[tuple[Tensor, tuple[Any, ...]]]  # each with the groups that it is summed over


@dataclass(eq=False)
class Ballot:
    """Whether a rank cannot use its gradients: one number, which goes along with a sum that is sent anyway.

    The pieces of a weight are in different hands, and so is the knowledge whether its gradient is finite.
    """

    objects: bool = False
    groups: tuple[Any, ...] = ()
    """The ranks that vote; none where every rank knows all."""
    device: torch.device | None = None

    def sum_over(self, sums: Sums) -> bool:
        """Sums up, the first time with the objections of all ranks; whether all is finite."""
        if not self.groups:
            return sum_over(sums)
        like = sums[0][0] if sums else torch.empty(0, dtype=torch.float64, device=self.device)
        paper = like.new_tensor([float(self.objects)])
        finite = sum_over([*sums, (paper, self.groups)])
        self.objects, self.groups = bool(paper), ()
        return finite


class Undo:
    """What the coming step of a cohort writes before all ranks have said that they can take it."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self.counts = cohort.step, cohort.observations
        writes_all = cohort.statistics_due or cohort.refresh_due
        self.tensors = {
            name: tensor.clone()
            for name, tensor in cohort.state.items()
            if writes_all or name in OF_PARAMETER_SHAPE
        }

    def restore(self) -> None:
        """Everything as it was, to the last bit."""
        self.cohort.step, self.cohort.observations = self.counts
        for name, tensor in self.tensors.items():
            self.cohort.state[name].copy_(tensor)


def observe(
    cohorts: Sequence[Cohort],
    gradients: Sequence[Tensor],
    samples: Samples,
    decays: Decays,
    ballot: Ballot | None = None,
) -> bool:
    """Each rank observes what it saw, one sum makes it what all saw; False, and no change, if not finite.

    What is not finite on one rank makes the sum so on all: they skip the step together.
    """
    trials: list[tuple[Cohort, State]] = []
    means: list[tuple[Cohort, Tensor, float]] = []
    own: list[tuple[Cohort, Tensor, float]] = []
    for cohort, gradient, decay in zip(cohorts, gradients, decays, strict=True):
        if decay is None or not cohort.tells(samples):
            continue
        if cohort.seat.exchanged:
            trials.append((cohort, _trial(cohort, gradient, samples, decay)))
        elif cohort.seat.sums_gradients:
            means.append((cohort, _mean_gradient(cohort, samples), decay))
        else:
            own.append((cohort, gradient, decay))
    sums = [(state[e.name], e.groups) for cohort, state in trials for e in cohort.seat.exchanged]
    sums += [(mean, ALL_RANKS) for _, mean, _ in means]
    ballot = ballot or Ballot()
    if sums and not ballot.sum_over(sums):
        return False
    if ballot.objects and not ballot.groups:  # nobody is left to vote
        return False
    for cohort, state in trials:
        _accept(cohort, state)
    for cohort, gradient, decay in means:
        cohort.plan.curvature.observe(cohort.state, BatchGradient(gradient), decay)
    for cohort, gradient, decay in own:
        cohort.observe_into(cohort.plan.curvature, cohort.state, gradient, samples, decay)
    for cohort in (*(c for c, _ in trials), *(c for c, _, _ in (*means, *own))):
        cohort.observations += 1
    return True


def warm_up(cohorts: Sequence[Cohort], samples: Samples, finite: bool) -> bool:
    """`observe` for all cohorts of all ranks or for none; `finite`: whether what this rank saw is.

    All observations of a cohort weigh alike.
    """
    shares = any(cohort.seat.exchanged or cohort.seat.sums_gradients for cohort in cohorts)
    ballot = Ballot(not finite, (ALL_RANKS,) if shares else ())
    gradients = [cohort.gradient() for cohort in cohorts]
    decays = [1 - 1 / (int(cohort.observations) + 1) for cohort in cohorts]
    return observe(cohorts, gradients, samples, decays, ballot)


def _exchanges(cohorts: Sequence[Cohort], samples: Samples) -> bool:
    """Whether `observe` is about to send anything."""
    return any(
        cohort.statistics_due and cohort.tells(samples)
        for cohort in cohorts
        if cohort.seat.exchanged or cohort.seat.sums_gradients
    )


def _trial(cohort: Cohort, gradient: Tensor, samples: Samples, decay: float) -> State:
    """What this rank's share makes of the averages, apart from the state.

    An owner brings decay X for all ranks, hence times their number.
    """
    seat = cohort.seat
    if seat.owner in (None, rank()):
        times = 1 if seat.owner is None else world_size()
        state = {**cohort.state, **{name: cohort.state[name] * times for name in _averages(cohort)}}
    else:
        state = _nothing(cohort)
    cohort.observe_into(seat.observer, state, gradient, samples, decay)
    for exchange in seat.exchanged:
        # NOTE the mean over no rows at all is NaN.
        tensor = state[exchange.name]
        state[exchange.name] = tensor.mul_(exchange.share) if exchange.share else tensor.zero_()
    return state


def _averages(cohort: Cohort) -> list[str]:
    """What `observe` writes into the state: what is exchanged, and what stays this rank's own."""
    exchanged = {exchange.name for exchange in cohort.seat.exchanged}
    return [name for name in cohort.state if name in exchanged.union(cohort.seat.observer.averages or ())]


def _nothing(cohort: Cohort) -> State:
    """A state before the first observation, of the stack's shapes."""
    fresh = cohort.seat.observer.init(cohort.layers[0])
    if len(cohort.layers) == 1:
        return fresh
    return {name: torch.stack([tensor] * len(cohort.layers)) for name, tensor in fresh.items()}


def _accept(cohort: Cohort, state: State) -> None:
    for name in _averages(cohort):
        cohort.state[name].copy_(state[name])


def _mean_gradient(cohort: Cohort, samples: Samples) -> Tensor:
    """This rank's share of the mean over all samples of all ranks, [layers, *layer.shape] for several."""
    means = [mean_gradient(samples[layer], layer.shape) / world_size() for layer in cohort.layers]
    return torch.stack(means) if len(means) > 1 else means[0]


def moves(cohorts: Sequence[Cohort], samples: Samples, finite: bool) -> list[Move] | None:
    """The steps of all cohorts, or None on all ranks: `finite` is whether this one's gradients are.

    Where nothing has to be summed before the directions, they are made on trust, and undone if a rank
    objects: its objection then comes with the lengths, in the only call of the step.
    """
    groups = dict.fromkeys(group for cohort in cohorts for group in cohort.seat.groups)
    if not (finite or groups):
        return None
    ballot = Ballot(not finite, tuple(groups), cohorts[0].tensors[0].device if cohorts else None)
    trusts = bool(groups) and not _exchanges(cohorts, samples)
    undone = [Undo(cohort) for cohort in cohorts] if trusts else []
    gradients = [cohort.gradient() if finite else torch.zeros_like(cohort.gradient()) for cohort in cohorts]
    decays = [cohort.corrected_decay() if cohort.statistics_due else None for cohort in cohorts]
    if not observe(cohorts, gradients, samples, decays, ballot):
        return None
    for cohort in cohorts:
        cohort.refresh()
    made = [cohort.propose(gradient) for cohort, gradient in zip(cohorts, gradients, strict=True)]
    _settle(made, ballot)
    if not ballot.objects:
        return made
    for undo in undone:
        undo.restore()
    return None


def _settle(made: Sequence[Move], ballot: Ballot) -> None:
    """Directions from their owners; lengths of whole weights, or rows, from those of their pieces."""
    fill_in([(m.direction, m.cohort.seat.owner) for m in made if m.cohort.seat.owner is not None])
    norms = [torch.stack(move.cohort.norms(move)) for move in made]
    squares = {
        index: norm.double().square_()
        for index, (norm, move) in enumerate(zip(norms, made, strict=True))
        if move.cohort.length_groups
    }
    ballot.sum_over([(square, made[index].cohort.length_groups) for index, square in squares.items()])
    if ballot.objects:
        return
    for index, square in squares.items():
        norms[index] = square.sqrt().to(norms[index].dtype)
    for norm, move in zip(norms, made, strict=True):
        move.cohort.settle(move, *norm)


def total(parts: Sums) -> float:
    """The sum of numbers [], each of them itself the sum over its groups."""
    numbers = [(part.detach().double().clone(), groups) for part, groups in parts]
    sum_over(numbers)
    return sum(float(number) for number, _ in numbers)


def mean_of(numbers: Sequence[Any]) -> list[float]:
    """Numbers of this rank's batch -> of all batches."""
    total = torch.tensor([float(number) / world_size() for number in numbers], dtype=torch.float64)
    sum_over([(total, ALL_RANKS)])
    return [float(number) for number in total]


def mean_secants(secants: Mapping[Layer, Secant]) -> dict[Layer, Secant]:
    """How far the means over all ranks' samples moved."""
    ranks = world_size()
    means = {layer: (s.output_change / ranks, s.gradient_change / ranks) for layer, s in secants.items()}
    sum_over([(tensor, ALL_RANKS) for pair in means.values() for tensor in pair])
    return {layer: Secant(*pair) for layer, pair in means.items()}
