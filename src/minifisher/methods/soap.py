"""SOAP: Adam in the eigenbasis of Shampoo's factors.

Source: Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, Kakade, "SOAP: Improving and Stabilizing
Shampoo using Adam", 2024, arXiv 2409.11321.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from minifisher.curvature import Curvature, Plan
from minifisher.linalg.dense import NO_CURVATURE, working_dtype
from minifisher.linalg.eigenvectors import eigenvectors, power_iteration
from minifisher.linalg.modes import TensorReading, mode_products, second_moment
from minifisher.methods.mode_factors import choose_reading
from minifisher.optimizer import CurvatureOptimizer
from minifisher.options import option
from minifisher.statistics.records import BatchGradient, Statistics

if TYPE_CHECKING:
    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer


@dataclass(frozen=True)
class EigenbasisAdam(Curvature):
    """SOAP: Adam in the basis Q_i of the eigenvectors of every H_i (Vyas et al., 2024, Algorithm 3).

    With D' = D x_i Q_i^T: V <- beta V + (1 - beta) D'^2; direction (M' / (sqrt(V) + lambda)^(2 power)) x_i
    Q_i, where M' is the mean of past gradients, not their sum: the step has Adam's length without a graft.
    A basis follows its factor by one step of the orthogonal iteration each refresh, and V is sorted as the
    basis is.
    """

    reading: TensorReading
    shape: torch.Size
    dtype: torch.dtype
    power: float = 0.5
    relative_damping: bool = True
    needs: type[Statistics] = BatchGradient

    averages_momentum = True  # so that a step has Adam's length

    def init(self, layer: Layer) -> State:
        """`factor_i` and `rotated_square`, V, are averaged; `basis_i` is what was last refreshed.

        [blocks, w_i, w_i] each, V [blocks, w_1, ..., w_K].
        """
        device, blocks, widths = layer.weight.device, self.reading.blocks, self.reading.widths
        state = {"rotated_square": torch.zeros((blocks, *widths), dtype=self.dtype, device=device)}
        for mode, width in enumerate(widths):
            state[f"factor_{mode}"] = torch.zeros((blocks, width, width), dtype=self.dtype, device=device)
            state[f"basis_{mode}"] = torch.zeros_like(state[f"factor_{mode}"])
        return state

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """H_i <- beta H_i + (1 - beta) mat_i(D) mat_i(D)^T; V likewise, in the basis that is there.

        The first observation, whose decay is 0, makes the basis: V must not mix the squares of two unlike
        bases.
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
        """Turn every Q_i towards the eigenvectors of H_i, and sort V along mode i as its columns were."""
        for mode, width in enumerate(self.reading.widths):
            if width == 1:
                continue
            basis = state[f"basis_{mode}"]
            factor = state[f"factor_{mode}"].to(working_dtype(self.dtype))
            turned, columns = power_iteration(factor, basis.to(factor.dtype))
            basis.copy_(turned)
            square = state["rotated_square"]
            axis = mode - self.reading.order
            index = columns.reshape(*columns.shape[:-1], *[1] * mode, width, *[1] * (-1 - axis))
            square.copy_(square.take_along_dim(index, axis))

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """Adam's step in the eigenbasis, turned back."""
        bases = self._bases(state)
        rotated = mode_products(self._read(direction), [basis.mT for basis in bases])
        rotated /= self._denominator(state, damping)
        return self.reading.write(mode_products(rotated, bases), self.shape).to(direction.dtype)

    def _denominator(self, state: State, damping: float) -> Tensor:
        """(sqrt(V) + lambda)^(2 power), [..., blocks, w_1, ..., w_K].

        lambda is `damping`, or relative that fraction of the root mean square of the layer's gradient.
        """
        square = state["rotated_square"].to(working_dtype(self.dtype))
        axes = tuple(range(-1 - self.reading.order, 0))
        if self.relative_damping:
            mean = square.sum(axes, keepdim=True) / self.shape.numel()
            level = damping * mean.clamp_min(NO_CURVATURE).sqrt()
        else:
            level = square.new_tensor(damping)
        return square.sqrt().add_(level).pow_(2 * self.power)

    def _read(self, tensor: Tensor) -> Tensor:
        return self.reading.read(tensor.to(working_dtype(self.dtype)), len(self.shape))

    def _bases(self, state: State) -> list[Tensor]:
        return [state[f"basis_{i}"].to(working_dtype(self.dtype)) for i in range(self.reading.order)]


def plan_eigenbasis(layer: Layer, options: dict[str, Any]) -> Plan:
    """A basis for each mode of a weight; kernels are a mode of their own (measured: docs/methods.md)."""
    reading, structure, reason = choose_reading(layer.shape, options, kept=2)
    curvature = EigenbasisAdam(
        reading=reading,
        shape=layer.shape,
        dtype=options["curvature_dtype"] or working_dtype(layer.weight.dtype),
        power=options["power"],
        relative_damping=options["relative_damping"],
    )
    schedule = options["statistics_every"] or 1, options["inverse_every"] or 10
    return Plan(curvature, structure, reason, reading.blocks, max(reading.widths), *schedule)


class SOAP(CurvatureOptimizer):
    """SOAP: Adam in the eigenbasis of Shampoo's factors, as in Vyas et al. 2024, arXiv 2409.11321.

    W <- W - lr (M' / (sqrt(V) + lambda)) x_1 Q_1 ... x_K Q_K: M' and V are the means of gradients, and of
    their squares, in the basis Q_i of the eigenvectors of H_i, the running mean of mat_i(D) mat_i(D)^T. The
    modes of a convolution are (out, in, k_1 k_2). `lr` is in Adam's step lengths; `damping` is lambda, with
    `relative_damping` as a fraction of the layer's root mean square.

    For [out, in] in blocks of [w_1, w_2], Q_i [w_i, w_i], a step and an observation cost O(out in (w_1 +
    w_2)), a refresh O(w_1^3 + w_2^3) a block; memory 2 (w_1^2 + w_2^2) + w_1 w_2 a block.
    """

    estimators = ("gradient",)

    lr: float | Tensor = option(default=3e-3, kw_only=False)
    momentum: float = option(default=0.95)
    damping: float = option(default=1e-4)
    graft: Literal["adam", "adam-rows", "sgd"] | None = option(default=None)
    power: float = option(
        default=0.5,
        above=0,
        note="1 for the inverse, 0.5 for the inverse root",
        meaning="Power of the inverse curvature; 0.5 divides by sqrt(V), as Adam.",
    )
    max_dim: int | None = option(
        default=None, at_least=1, meaning="Longer dimensions are cut into blocks; None chooses."
    )
    merge_dims: int | None = option(
        default=None,
        at_least=1,
        meaning="Neighbouring dimensions are merged up to this product; None: (out, in, rest).",
    )

    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """A basis for each mode of a weight, in blocks that memory allows."""
        return plan_eigenbasis(layer, options)
