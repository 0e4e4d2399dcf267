"""SOAP: Adam in the eigenbasis of Shampoo's factors.

Source: Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, Kakade, "SOAP: Improving and Stabilizing
Shampoo using Adam", 2024, arXiv 2409.11321.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from minifisher.linalg.damping import LEAST_SCALE
from minifisher.linalg.dense import working_dtype
from minifisher.linalg.eigenvectors import eigenvectors, power_iteration
from minifisher.linalg.modes import mode_products, second_moment
from minifisher.methods.choices import curvature_dtype
from minifisher.methods.mode_factors import ModeCurvature, ModeOptimizer, choose_reading, plan_of
from minifisher.options import option
from minifisher.statistics.records import BatchGradient, Statistics

if TYPE_CHECKING:
    from minifisher.curvature import Plan, State
    from minifisher.statistics.layers import Layer


@dataclass(frozen=True)
class EigenbasisAdam(ModeCurvature):
    """Adam in the basis Q_i of the eigenvectors of H_i, for every mode i (Vyas et al., 2024, Algorithm 3).

    With D' = D x_i Q_i^T, V <- beta V + (1 - beta) D'^2. The direction is
    (M' / (sqrt(V) + lambda)^(2 power)) x_i Q_i. M' is the mean of past gradients, not their sum: the step has
    Adam's length without a graft. Each refresh moves Q_i by one step of orthogonal iteration, and sorts V as
    the columns of Q_i are sorted.

    An index of mode i whose gradient was always zero, such as an unused row of an embedding, has zeros in
    H_i: it belongs to the null space. In exact arithmetic M' and V are zero there; rounding would leave a
    quotient of two rounding errors. Such indices are left out of the rotation, and stay.

    V that `misses_gradients` is no bound of M': a gradient with a new direction meets V = 0 there, and the
    step has any length. V is then at least M'^2, so that no entry of the rotated direction is above 1.
    """

    power: float = 0.5
    misses_gradients: bool = False
    """Whether `observe` does not see every gradient, so that `precondition` bounds its steps itself."""

    averages_momentum = True  # M' is a mean, so that a step has Adam's length

    def init(self, layer: Layer) -> State:
        """`factor_i`, which is H_i, and `basis_i`, Q_i, [blocks, w_i, w_i]; `rotated_square`, V.

        V is [blocks, w_1, ..., w_K].
        """
        device, blocks, widths = layer.weight.device, self.reading.blocks, self.reading.widths
        state = {"rotated_square": torch.zeros((blocks, *widths), dtype=self.dtype, device=device)}
        for mode, width in enumerate(widths):
            state[f"factor_{mode}"] = torch.zeros((blocks, width, width), dtype=self.dtype, device=device)
            state[f"basis_{mode}"] = torch.zeros_like(state[f"factor_{mode}"])
        return state

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """H_i <- beta H_i + (1 - beta) mat_i(D) mat_i(D)^T, and V likewise in the present basis.

        The first observation, which has decay 0, also computes the basis. Otherwise V would mix squares in
        two different bases.
        """
        assert isinstance(statistics, BatchGradient)
        blocks, order = self._read(statistics.gradient), self.reading.order
        for mode in range(order):
            factor = state[f"factor_{mode}"]
            factor.lerp_(second_moment(blocks, mode, order).to(self.dtype), 1 - decay)
            if decay == 0:
                state[f"basis_{mode}"].copy_(eigenvectors(factor.to(blocks.dtype)))
        rotated = mode_products(blocks, [basis.mT for basis in self._bases(state)])
        state["rotated_square"].lerp_(rotated.square().to(self.dtype), 1 - decay)

    def refresh(self, state: State, damping: float) -> None:
        """Move every Q_i towards the eigenvectors of H_i, and sort V along mode i like the columns of Q_i."""
        for mode, width in enumerate(self.reading.widths):
            if width == 1:
                continue
            basis = state[f"basis_{mode}"]
            factor = state[f"factor_{mode}"].to(working_dtype(self.dtype))
            moved, columns = power_iteration(factor, basis.to(factor.dtype))
            basis.copy_(moved)
            square = state["rotated_square"]
            axis = mode - self.reading.order
            index = columns.reshape(*columns.shape[:-1], *[1] * mode, width, *[1] * (-1 - axis))
            square.copy_(square.take_along_dim(index, axis))

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """(M' / (sqrt(V) + lambda)^(2 power)) x_i Q_i; linear in M', unless V `misses_gradients`."""
        bases = self._bases(state)
        rotated = mode_products(self._read(direction), [basis.mT for basis in bases])
        denominator = self._denominator(state, damping)
        if self.misses_gradients:
            denominator = torch.maximum(denominator, rotated.abs().pow_(2 * self.power))
        rotated /= denominator
        return self.reading.write(mode_products(rotated, bases), self.shape).to(direction.dtype)

    def _bases(self, state: State) -> list[Tensor]:
        """Q_i for every mode, with zeros in the rows of indices that never had a gradient."""
        factors, bases = (self._matrices(state, name) for name in ("factor", "basis"))
        return [
            basis * (factor.diagonal(dim1=-2, dim2=-1) > 0).unsqueeze(-1)
            for factor, basis in zip(factors, bases, strict=True)
        ]

    def _denominator(self, state: State, damping: float) -> Tensor:
        """(sqrt(V) + lambda)^(2 power), [..., blocks, w_1, ..., w_K].

        Relative: lambda is `damping` times the root mean square of the gradient's entries in the layer.
        """
        square = state["rotated_square"].to(working_dtype(self.dtype))
        axes = tuple(range(-1 - self.reading.order, 0))
        if self.relative_damping:
            mean = square.sum(axes, keepdim=True) / self.shape.numel()
            level = damping * mean.clamp_min(LEAST_SCALE).sqrt()
        else:
            level = square.new_tensor(damping)
        return square.sqrt().add_(level).pow_(2 * self.power)


def plan_eigenbasis(layer: Layer, options: dict[str, Any]) -> Plan:
    """A basis for each mode of a weight; the entries of a kernel are a mode (measured: docs/methods.md)."""
    every = options["statistics_every"] or 1
    curvature = EigenbasisAdam(
        reading=choose_reading(layer.shape, options, kept=2),
        shape=layer.shape,
        needs=BatchGradient,
        dtype=curvature_dtype(layer, options),
        relative_damping=options["relative_damping"],
        power=options["power"],
        misses_gradients=every > 1 and options["graft"] is None,
    )
    return plan_of(curvature, options["max_dim"], (every, options["inverse_every"] or 10))


class SOAP(ModeOptimizer):
    """SOAP, Adam in the eigenbasis of Shampoo: W <- W - lr (M' / (sqrt(V) + lambda)) x_1 Q_1 ... x_K Q_K.

    A weight is read as a tensor of K modes: (out, in) of a Linear, (out, in, k1 k2) of a convolution. Q_i are
    the eigenvectors of H_i, the running mean of mat_i(D) mat_i(D)^T over mini-batch gradients D. M' and V are
    running means of D and of its square, in the basis of the Q_i. Vyas et al. 2024, arXiv 2409.11321; the
    published settings as arguments: docs/methods.md.

    `lr` is in Adam's step lengths. `damping` is lambda, or with `relative_damping` the fraction of the root
    mean square of the layer's gradient that lambda is.

    For W [out, in] in blocks of [w_1, w_2], with Q_i [w_i, w_i]: a step and an observation cost
    O(out in (w_1 + w_2)). A refresh costs O(w_1^3 + w_2^3) for each block, and the state has
    2 (w_1^2 + w_2^2) + w_1 w_2 numbers for each block.
    """

    estimators: ClassVar[tuple[str, ...]] = ("gradient",)

    lr: float | Tensor = option(default=3e-3, kw_only=False)
    momentum: float = option(default=0.95)
    damping: float = option(default=1e-4)
    graft: Literal["adam", "adam-rows", "sgd"] | None = option(default=None)
    power: float = option(default=0.5, meaning="Divides by (sqrt(V) + lambda)^(2 power); 0.5 is Adam.")
    merge_dims: int | None = option(
        default=None,
        meaning="Neighbouring dimensions, from the last on, form one mode while their product is at most "
        "this; None: (out, in, all others).",
    )

    def _plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        return plan_eigenbasis(layer, options)
