"""TNT: the covariance of a tensor-normal gradient, with one factor for each mode of a weight.

Source: Ren, Goldfarb, "Tensor Normal Training for Deep Learning Models", NeurIPS 2021, arXiv 2106.02925,
and the authors' public code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from minifisher.linalg.blocks import damped_inverse_power
from minifisher.linalg.damping import LEAST_SCALE, above_rounding
from minifisher.methods.mode_factors import (
    ModeFactors,
    ModeOptimizer,
    choose_reading,
    choose_schedule,
    factor_fields,
    plan_of,
)
from minifisher.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from minifisher.curvature import Plan, State
    from minifisher.statistics.layers import Layer


@dataclass(frozen=True)
class TensorNormal(ModeFactors):
    """The covariance Omega_1 (x) ... (x) Omega_K; the direction is M x_i (Omega_i + lambda I)^(-power).

    H_i = E[mat_i(D) mat_i(D)^T] = Omega_i prod_(j != i) tr(Omega_j) leaves the scale of each Omega_i open.
    As in the published code, all get the same mean eigenvalue c = (T / n)^(1/K):
    Omega_i = H_i / (c^(K-1) prod_(j != i) n_j), with T = tr(H_i), equal for all modes, and n = prod_j n_j
    (Ren, Goldfarb, 2021).
    """

    power: float = 1.0

    def covariances(self, state: State) -> list[Tensor]:
        """Omega_i for every mode, [..., blocks, w_i, w_i]."""
        squares = self._mean_squares(state)[0].clamp_min(LEAST_SCALE)  # T / n
        lengths = self._lengths(squares)
        divisor = squares.pow(1 - 1 / self.reading.order) * self._entries(squares)  # c^(K-1) prod_j n_j
        return [
            factor / (divisor / length)[..., None, None]
            for factor, length in zip(self._matrices(state, "factor"), lengths, strict=True)
        ]

    def refresh(self, state: State, damping: float) -> None:
        """`inverse_i` <- (Omega_i + lambda I)^(-power)."""
        levels = self._damping_levels(state, damping)
        for mode, (omega, level) in enumerate(zip(self.covariances(state), levels, strict=True)):
            damping_of_mode = above_rounding(level, omega, self.dtype).unsqueeze(-1)
            state[f"inverse_{mode}"].copy_(damped_inverse_power(omega, damping_of_mode, self.power))

    def _relative_damping(self, scale: Tensor, damping: float) -> list[Tensor]:
        """lambda is `damping` times c, where `scale` is taken for T / n."""
        return [damping * scale.pow(1 / self.reading.order)] * self.reading.order


class TNT(ModeOptimizer):
    """Tensor Normal Training: W <- W - lr M x_1 (Omega_1 + lambda I)^-1 ... x_K (Omega_K + lambda I)^-1.

    A weight is read as a tensor of K modes: (out, in) of a Linear, (out, in k1 k2) of a convolution.
    H_i = E[mat_i(D) mat_i(D)^T], and Omega_i is H_i scaled so that all modes have the same mean eigenvalue c.
    D is the gradient of the *mean* loss of a mini-batch with labels drawn from the model, as in the published
    code (`fisher="sampled"`, which needs a call of `observe`). The scale of its H_i is that of F / N; see
    `per_sample`. Layers without samples are measured by their mini-batch gradient; `describe()` shows which.
    Ren, Goldfarb 2021, arXiv 2106.02925; the published settings as arguments: docs/methods.md.

    `lr` is in step lengths of `graft`. `damping` is lambda, or with `relative_damping` the fraction of c that
    lambda is; it is the same for every mode.

    For W [out, in] in blocks of [w_1, w_2], with Omega_i [w_i, w_i]: a step and an observation cost
    O(out in (w_1 + w_2)). A refresh costs O(w_1^3 + w_2^3) for each block, and the state has
    2 (w_1^2 + w_2^2) numbers for each block. Raises ValueError for parameters without their nn.Module.
    """

    fisher: Literal["gradient", "empirical", "sampled", "exact"] = option(default="sampled")
    per_sample: bool = option(
        default=False,
        meaning="Average over the gradients of single samples, instead of using that of the mean loss.",
    )

    def _plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        if options["fisher"] == "exact" and not options["per_sample"]:
            raise ValueError(
                'fisher="exact" averages over all labels of each sample, and the mean loss has one label for '
                'each: pass per_sample=True with it, or fisher="sampled"'
            )
        reading = choose_reading(layer.shape, options)
        curvature = TensorNormal(
            **factor_fields(layer, reading, options),
            per_sample=options["per_sample"],
            power=options["power"],
        )
        return plan_of(curvature, options["max_dim"], choose_schedule(curvature, options))
