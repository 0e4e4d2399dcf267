"""The contract between the engine and a method: four verbs, each called on a schedule of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from minifisher.statistics.layers import Layer
    from minifisher.statistics.records import Statistics

    State = dict[str, Tensor]

LARGEST_COPY = 4_194_304
"""Entries. A layer with more of them is read and stepped in parts: no copy of it takes more than 16 MiB."""


class Curvature(ABC):
    """A structured approximation of the curvature of one layer.

    A subclass is a frozen dataclass: its fields are configuration and hold no tensors. What changes is the
    dictionary that `init` returns. It *is* `optimizer.state[weight]`, so checkpoints and sharding see every
    tensor. Tensors may have leading dimensions `...`: the engine stacks equal layers, and calls a verb once.
    """

    needs: type[Statistics] | None
    """The record that `observe` reads: BatchGradient, LayerSamples or Secant; None if it reads none."""

    # ---- the four verbs ----

    @abstractmethod
    def init(self, layer: Layer) -> State:
        """The state before the first observation, in the dtype in which the curvature is kept."""

    @abstractmethod
    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """Average the statistics of one backward pass in, in place: X <- decay X + (1 - decay) X_new."""

    def refresh(self, state: State, damping: float) -> None:  # noqa: B027 - many methods cache nothing
        """Recompute what `precondition` reads and `observe` does not write: inverses, roots."""

    @abstractmethod
    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """The damped inverse curvature times `direction`, [..., *layer.shape]: a new tensor.

        Linear in the direction, but for SOAP with `statistics_every` above 1, whose denominator is then at
        least that of the direction itself.
        """

    # ---- what the engine asks ----

    averages_momentum: ClassVar[bool] = False
    """Whether it steps by the mean of past gradients, as Adam does, instead of by their sum M.

    A weight decay that is not decoupled then joins the gradient that the curvature observes, too.
    """

    @property
    def recomputed(self) -> tuple[str, ...]:
        """The tensors that `refresh` computes from the others alone: NaN where it failed, until the next."""
        return ()

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can record it: no verb reads a number from the device.

        The decay of `observe` is then a tensor, [].
        """
        return False

    # ---- what reports ask ----

    def matrices(self, state: State) -> Sequence[Tensor]:
        """The second-moment matrices of the state, [..., b, b] each, or some of them; by default none."""
        return ()

    # ---- what several processes ask ----

    @property
    def averages(self) -> tuple[str, ...] | None:
        """The tensors that `observe` writes, which are averages over samples; None means all of them."""
        return None

    @property
    def reads_mean_gradient(self) -> bool:
        """Whether `observe` reads only the mean gradient of samples; it then takes a BatchGradient, too."""
        return False

    @property
    def reads_caches(self) -> bool:
        """Whether `observe` reads what `refresh` wrote; the rank that refreshes must then observe."""
        return False

    def shard(self, shape: torch.Size) -> Curvature | None:
        """The same curvature for a piece of the weight, of this shape; None if it needs the whole weight."""
        return None

    def state_axes(self, dimension: int) -> dict[str, int | None]:
        """The axis along which each tensor of the state is cut if the weight is cut along `dimension`."""
        return {}


class FusedCurvature(Curvature):
    """A curvature that can take a whole step of a layer in one pass over its memory."""

    @abstractmethod
    def fused_step(
        self, state: State, gradient: Tensor, decay: float, damping: float, first_order: FirstOrderStep
    ) -> tuple[Tensor, Measures, Measures] | None:
        """Update M and V, observe the gradient, and precondition M; None, and no change, if no kernel fits.

        Returns the direction, and what is measured of it and of the first-order step, [..., lengths]. The
        direction is that of the separate verbs, to the last bit.
        """


class FusedDirection(Curvature):
    """A curvature that can take the first-order step and precondition in one pass over memory.

    Its statistics are observed apart, on their schedule.
    """

    @property
    @abstractmethod
    def rows_of_block(self) -> int:
        """How many neighbouring rows of the weight share a block: between them the weight is not cut."""

    @abstractmethod
    def fused_direction(
        self, state: State, gradient: Tensor, first_order: FirstOrderStep
    ) -> tuple[Tensor, Measures, Measures] | None:
        """Update M and V, and precondition N; None, and no change, if no kernel fits.

        Returns what `FusedCurvature.fused_step` returns.
        """


class Measures(NamedTuple):
    """What the rule of length reads of a step x: one number for each length.

    Where the rule is that of equal norms there is only the first. The last two are those of a first-order
    step that has a second moment V.
    """

    norm: Tensor  # |x|
    slope: Tensor | None = None  # <M, x>
    newest: Tensor | None = None  # |D|^2
    usual: Tensor | None = None  # its average over all steps so far: the sum of V / (1 - beta^t)

    def map(self, function: Callable[[Tensor], Tensor]) -> Measures:
        """The function of each tensor."""
        norm, *others = self
        return Measures(function(norm), *(None if number is None else function(number) for number in others))

    def corrected(self, scale: Any, sum_of_weights: Any) -> Measures:
        """Of a step that is `scale` times as long, and of V / `sum_of_weights` instead of V; in place."""
        return Measures(
            self.norm.mul_(scale),
            None if self.slope is None else self.slope.mul_(scale),
            self.newest,
            None if self.usual is None else self.usual.div_(sum_of_weights),
        )


@dataclass(frozen=True)
class FirstOrderStep:
    """The first-order step, as numbers for a fused kernel.

    M <- mu M + D, V <- beta V + (1 - beta) D^2; the step is M / (sqrt(V) + epsilon), or M without V.
    """

    momentum_decay: float  # mu
    momentum: Tensor  # M, [..., *layer.shape]
    second_moment: Tensor | None = None  # V, likewise
    second_moment_decay: float = 0.0  # beta
    epsilon: float = 0.0
    scale: float = 1.0
    """The factor of the step's length: its bias corrections."""
    sum_of_weights: float = 1.0
    """1 - beta^t, by which V is divided."""
    lengths: int = 1
    """How many lengths a layer has: one, or one for each row."""
    with_slopes: bool = False
    """Whether slopes are measured, beside norms."""
    nesterov: bool = False
    """Whether mu M + D is preconditioned, instead of M."""


@dataclass(frozen=True)
class NoCurvature(Curvature):
    """No curvature: the layer takes the first-order step of its graft."""

    needs: type[Statistics] | None = field(default=None, init=False)

    def shard(self, shape: torch.Size) -> Curvature:
        """Itself."""
        return self

    def init(self, layer: Layer) -> State:
        """Empty."""
        return {}

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """Nothing to average."""

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """The direction itself, copied."""
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
    statistics_phase: int = 0
    """Set by the engine, so that layers take turns: see `minifisher.step.schedule`."""
    inverse_phase: int = 0
    """Likewise."""
    first_order: str | None = None
    """The first-order method whose step, or step length, the layer takes; None: the `graft` of its group."""


def no_curvature(reason: str) -> Plan:
    """The plan of a layer that takes the first-order step, and why."""
    return Plan(NoCurvature(), "first-order step", reason, 0, 0, 1, 1)


def first_order_plan(method: str, reason: str) -> Plan:
    """The plan of a layer that takes this method's step, whatever the `graft` of its group, and why."""
    return replace(no_curvature(reason), structure=f"step of {method}", first_order=method)
