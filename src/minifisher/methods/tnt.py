"""TNT: the covariance of a weight's gradient read as a tensor-normal distribution, one factor for each mode.

Source: Ren, Goldfarb, "Tensor Normal Training for Deep Learning Models", NeurIPS 2021, arXiv 2106.02925,
and the authors' public code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from minifisher.curvature import Plan
from minifisher.linalg.dense import NO_CURVATURE, working_dtype
from minifisher.methods.mode_factors import (
    ModeFactors,
    choose_reading,
    choose_schedule,
    damped_power,
)
from minifisher.optimizer import CurvatureOptimizer
from minifisher.options import option
from minifisher.statistics.records import BatchGradient, LayerSamples

if TYPE_CHECKING:
    from torch import Tensor

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer


@dataclass(frozen=True)
class TensorNormal(ModeFactors):
    """The covariance Omega_1 (x) ... (x) Omega_K of a tensor-normal gradient; M x_i (Omega_i + lambda I)^-1.

    E[mat_i(D) mat_i(D)^T] = Omega_i prod_(j != i) tr(Omega_j) leaves the scale of each factor open. All get
    the same mean eigenvalue c = (T / n)^(1/K), where T = tr(H_i), equal for all modes, and n = prod n_j:
    Omega_i = H_i / (c^(K-1) prod_(j != i) n_j). (Ren, Goldfarb, 2021, and the published code.)
    """

    power: float = 1.0

    def covariances(self, state: State) -> list[Tensor]:
        """Omega_i for every mode, [..., blocks, w_i, w_i]."""
        squares = self._mean_squares(state)[0].clamp_min(NO_CURVATURE)
        lengths = self._lengths(squares)
        rest = squares.pow(1 - 1 / self.reading.order) * self._entries(squares)  # c^(K-1) prod_j n_j
        return [
            factor / (rest / length)[..., None, None]
            for factor, length in zip(self._factors(state), lengths, strict=True)
        ]

    def refresh(self, state: State, damping: float) -> None:
        """`inverse_i` <- (Omega_i + lambda I)^(-power), the same lambda for every mode."""
        levels = self._damping(state, damping)
        for mode, omega in enumerate(self.covariances(state)):
            state[f"inverse_{mode}"].copy_(damped_power(omega, levels, self.power))

    def _damping(self, state: State, damping: float) -> Tensor:
        """Lambda of every block, [..., blocks]: as given, or relative to c.

        Relative: c of the mean of two mean squares, the block's and the layer's, so that a block without
        curvature (dead units) is damped as its layer is.
        """
        block, layer = self._mean_squares(state)
        if not self.relative_damping:
            return block.new_tensor(damping).expand_as(block)
        return damping * (0.5 * (block + layer)).clamp_min(NO_CURVATURE).pow(1 / self.reading.order)


class TNT(CurvatureOptimizer):
    """Tensor Normal Training: W <- W - lr M x_1 (Omega_1 + lambda I)^-1 ... x_K (Omega_K + lambda I)^-1.

    Ren, Goldfarb 2021, arXiv 2106.02925. A weight is a tensor of K modes: (out, in) of a Linear, (out, in
    k_1 k_2) of a convolution, or what `merge_dims` makes of it: neighbouring dimensions are merged, the
    last ones first, while their product stays within it (9: the published (out, in, k_1 k_2) of 3x3
    kernels). H_i is the running mean of mat_i(D) mat_i(D)^T, D the gradient of the mini-batch's *mean* loss
    for labels drawn from the model (`fisher="sampled"`: call `observe`), as in the published code; its
    scale is F / N. `per_sample=True` averages over the gradients of single samples instead. Omega_i is H_i
    scaled so that all modes have the mean eigenvalue c. Layers that cannot be read sample by sample are
    measured by their mini-batch gradient; `describe()` says which, and which dimensions were cut into
    blocks (`max_dim`, by default 256).

    `damping` is lambda, the same for every mode, or with `relative_damping` the fraction of c that lambda is.
    `lr` is in step lengths of `graft`. For [out, in] in blocks of [w_1, w_2], H_i and Omega_i [w_i, w_i]: a
    step and an observation cost O(out in (w_1 + w_2)), a refresh O(w_1^3 + w_2^3) a block, memory 2 (w_1^2 +
    w_2^2) a block of w_1 w_2 weights.
    """

    fisher: Literal["gradient", "empirical", "sampled", "exact"] = option(default="sampled")
    power: float = option(
        default=1.0,
        above=0,
        note="1 for the inverse, 0.5 for the inverse root",
        meaning="Power of the inverse curvature.",
    )
    per_sample: bool = option(
        default=False, meaning="Average over the gradients of samples, instead of that of the mean loss."
    )
    max_dim: int | None = option(
        default=None, at_least=1, meaning="Longer dimensions are cut into blocks; None chooses."
    )
    merge_dims: int | None = option(
        default=None,
        at_least=1,
        meaning="Neighbouring dimensions are merged while their product is at most this; None: (out, rest).",
    )

    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """A covariance for each mode of a weight, in blocks that memory allows."""
        if options["fisher"] == "exact" and not options["per_sample"]:
            raise ValueError(
                'fisher="exact" sums over all labels, and what belongs to one of them is no gradient of the '
                'mean loss: pass per_sample=True with it, or fisher="sampled"'
            )
        reading, structure, reason = choose_reading(layer.shape, options)
        from_gradient = options["fisher"] == "gradient" or not layer.reads_samples
        curvature = TensorNormal(
            reading=reading,
            shape=layer.shape,
            needs=BatchGradient if from_gradient else LayerSamples,
            dtype=options["curvature_dtype"] or working_dtype(layer.weight.dtype),
            relative_damping=options["relative_damping"],
            per_sample=options["per_sample"],
            power=options["power"],
        )
        schedule = choose_schedule(reading, from_gradient, options)
        return Plan(curvature, structure, reason, reading.blocks, max(reading.widths), *schedule)
