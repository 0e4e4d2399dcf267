"""The contract between the engine and a method: four verbs that carry the schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import Statistics

    State = dict[str, Tensor]


@dataclass(frozen=True)
class FirstOrderStep:
    """The step of SGD with momentum or of Adam, for a pass over the weight that computes it too.

    M <- mu M + D, and with a second moment V <- beta V + (1 - beta) D^2; the step is scale M, or
    scale M / (sqrt(V) + epsilon).
    """

    momentum_decay: float  # mu
    momentum: Tensor  # M, [..., *layer.shape]
    second_moment: Tensor | None = None  # V, the same shape
    second_moment_decay: float = 0.0  # beta
    epsilon: float = 0.0
    scale: float = 1.0  # bias corrections of Adam


class Curvature(ABC):
    """A structured approximation of the curvature of one layer.

    A subclass is a frozen dataclass: its fields are configuration and hold no tensors. What changes is the
    dictionary that `init` makes; it *is* `optimizer.state[weight]`, so checkpoints and sharding see it.
    Tensors may carry leading dimensions `...`: the engine stacks equal layers and calls each verb once.
    """

    needs: type[Statistics] | None
    """The record that `observe` reads: BatchGradient, LayerSamples or Secant; None where it reads none."""

    @property
    def averages(self) -> tuple[str, ...] | None:
        """What `observe` writes, averages of what samples told: ranks exchange it; None for all."""
        return None

    @property
    def reads_mean_gradient(self) -> bool:
        """Whether `observe` takes of LayerSamples their mean gradient alone, and a BatchGradient instead."""
        return False

    @property
    def reads_caches(self) -> bool:
        """Whether `observe` reads what `refresh` wrote: then no rank observes what another one refreshes."""
        return False

    @property
    def capturable(self) -> bool:
        """Whether no verb asks the device for a number; the decay of `observe` is then a tensor, []."""
        return False

    @property
    def steps_by_mean(self) -> bool:
        """Whether it steps as Adam does: by the mean of past gradients, with a coupled decay in all of them.

        Others step by the sum M, which the decay joins, but not their curvature.
        """
        return False

    def shard(self, shape: torch.Size) -> Curvature | None:
        """The same curvature of a piece of the weight, of this shape; None where it needs the whole."""
        return None

    def advance(
        self, state: State, gradient: Tensor, decay: float, damping: float, first_order: FirstOrderStep
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """In one pass what the graft does to M, `observe` of the batch gradient, and `precondition` of M.

        Returns the direction and two lengths [..., 1], its own and the first-order step's; None, and nothing
        changed, where there is no such pass. It agrees with the verbs one after another.
        """
        return None

    @abstractmethod
    def init(self, layer: Layer) -> State:
        """The state before the first observation, in the dtype that the curvature is kept in."""

    @abstractmethod
    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """Average what one backward pass told into the state, in place: X <- decay X + (1 - decay) X_new."""

    def refresh(self, state: State, damping: float) -> None:  # noqa: B027 - nothing to cache is the common case
        """Recompute what `precondition` reads and `observe` does not write: inverses, roots."""

    @abstractmethod
    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """The damped inverse curvature times `direction`, [..., *layer.shape]; linear, a new tensor."""


@dataclass(frozen=True)
class FirstOrder(Curvature):
    """No curvature: the layer takes the graft's first-order step, or the momentum M where there is no graft.

    That is what the engine does with a layer of which it has observed nothing.
    """

    needs = None

    def shard(self, shape: torch.Size) -> Curvature:
        """Itself."""
        return self

    def init(self, layer: Layer) -> State:
        """Nothing."""
        return {}

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """Nothing."""

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """The direction."""
        return direction.clone()


@dataclass(frozen=True)
class Plan:
    """What a method chose for one layer, and why: `describe()` prints it."""

    curvature: Curvature
    structure: str  # "blocks of shared rows"
    reason: str
    blocks: int
    block_size: int
    statistics_every: int  # T1, in steps
    inverse_every: int  # T2, in steps


def first_order(reason: str) -> Plan:
    """The plan of a layer that has no curvature, and why."""
    return Plan(FirstOrder(), "first-order step", reason, 0, 0, 1, 1)
