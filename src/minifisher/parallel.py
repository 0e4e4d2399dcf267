"""The step of processes that train together: the same loop in phases, with exchanges between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minifisher.distributed import ALL_RANKS, agree, fill_in, rank, sum_over, world_size
from minifisher.statistics.records import BatchGradient, Secant, mean_gradient

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from torch import Tensor

    from minifisher.cohort import Cohort, Move
    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import LayerSamples

    Samples = Mapping[Layer, LayerSamples]
    Decays = Sequence[float | None]  # one a cohort; None where it is not due


def observe(cohorts: Sequence[Cohort], gradients: Sequence[Tensor], samples: Samples, decays: Decays) -> bool:
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
    if not sum_over([*sums, *((mean, ALL_RANKS) for _, mean, _ in means)]):
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


def _trial(cohort: Cohort, gradient: Tensor, samples: Samples, decay: float) -> State:
    """What this rank's share makes of the averages, apart from the state.

    An owner brings decay X for all ranks, hence times their number.
    """
    seat = cohort.seat
    names = [exchange.name for exchange in seat.exchanged]
    if seat.owner in (None, rank()):
        times = 1 if seat.owner is None else world_size()
        state = {**cohort.state, **{name: cohort.state[name] * times for name in names}}
    else:
        state = _nothing(cohort)
    cohort.observe_into(seat.observer, state, gradient, samples, decay)
    for exchange in seat.exchanged:
        # NOTE the mean over no rows at all is NaN.
        tensor = state[exchange.name]
        state[exchange.name] = tensor.mul_(exchange.share) if exchange.share else tensor.zero_()
    return state


def _nothing(cohort: Cohort) -> State:
    """A state before the first observation, of the stack's shapes."""
    fresh = cohort.seat.observer.init(cohort.layers[0])
    if len(cohort.layers) == 1:
        return fresh
    return {name: torch.stack([tensor] * len(cohort.layers)) for name, tensor in fresh.items()}


def _accept(cohort: Cohort, state: State) -> None:
    for exchange in cohort.seat.exchanged:
        if exchange.name in cohort.state:
            cohort.state[exchange.name].copy_(state[exchange.name])


def _mean_gradient(cohort: Cohort, samples: Samples) -> Tensor:
    """This rank's share of the mean over all samples of all ranks, [layers, *layer.shape] for several."""
    means = [mean_gradient(samples[layer], layer.shape) / world_size() for layer in cohort.layers]
    return torch.stack(means) if len(means) > 1 else means[0]


def moves(cohorts: Sequence[Cohort], samples: Samples, finite: bool) -> list[Move] | None:
    """The steps of all cohorts, or None on all ranks: `finite` is whether this one's gradients are."""
    groups = [group for cohort in cohorts for group in cohort.seat.groups]
    if not (agree(finite, groups, cohorts[0].tensors[0].device) if groups else finite):
        return None
    gradients = [cohort.gradient() for cohort in cohorts]
    decays = [cohort.corrected_decay() if cohort.statistics_due else None for cohort in cohorts]
    if not observe(cohorts, gradients, samples, decays):
        return None
    for cohort in cohorts:
        cohort.refresh()
    made = [cohort.propose(gradient) for cohort, gradient in zip(cohorts, gradients, strict=True)]
    _settle(made)
    return made


def _settle(made: Sequence[Move]) -> None:
    """Directions from their owners; lengths of whole weights from those of their pieces."""
    fill_in([(m.direction, m.cohort.seat.owner) for m in made if m.cohort.seat.owner is not None])
    norms = [torch.stack(move.cohort.norms(move)) for move in made]
    squares = [
        (norm.double().square_(), index)
        for index, (norm, move) in enumerate(zip(norms, made, strict=True))
        if move.cohort.seat.cuts
    ]
    sum_over((square, made[index].cohort.seat.groups) for square, index in squares)
    for square, index in squares:
        norms[index] = square.sqrt().to(norms[index].dtype)
    for norm, move in zip(norms, made, strict=True):
        move.cohort.settle(move, *norm)


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
