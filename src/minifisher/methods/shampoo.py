"""Shampoo: an inverse root of a second moment for each mode of a weight.

Sources: Gupta, Koren, Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", ICML 2018, arXiv
1802.09568; Anil, Gupta, Koren, Regan, Singer, "Scalable Second Order Optimization for Deep Learning", 2020,
arXiv 2002.09018.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from minifisher.linalg.blocks import damped_inverse_power
from minifisher.linalg.damping import above_rounding
from minifisher.linalg.dense import add_to_diagonal, inverse_power
from minifisher.linalg.newton import newton_inverse_root
from minifisher.methods.mode_factors import (
    ModeFactors,
    ModeOptimizer,
    choose_reading,
    choose_schedule,
    factor_fields,
    plan_of,
)
from minifisher.methods.soap import plan_eigenbasis
from minifisher.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from minifisher.curvature import Plan, State
    from minifisher.linalg.modes import TensorReading
    from minifisher.statistics.layers import Layer

# The largest residual of a Newton root that is used. In float32 it is reached at a condition number of 1e6.
_RESIDUAL = 0.1


@dataclass(frozen=True)
class KroneckerRoots(ModeFactors):
    """Shampoo: M x_i (H_i + lambda_i I)^(-exponent) for every mode i (Gupta et al., 2018, Algorithm 2).

    The published exponent is 1 / (2K). `root` is "eigen", by eigendecomposition, or "newton", by the coupled
    Newton iteration. A Newton root whose residual is above `tolerance` is replaced by one from an
    eigendecomposition, and counted.
    """

    exponent: float = 0.25
    root: Literal["eigen", "newton"] = "eigen"
    tolerance: float = _RESIDUAL

    @property
    def recomputed(self) -> tuple[str, ...]:
        """The inverses and, of a Newton iteration, the residual, which is infinite where it overflowed."""
        return (*super().recomputed, *(["residual"] if self.root == "newton" else []))

    def init(self, layer: Layer) -> State:
        """With "newton" also `residual`, the largest of the last refresh, and `newton_fallbacks`: []."""
        state = super().init(layer)
        if self.root == "newton":
            state["residual"] = torch.zeros((), dtype=torch.float32, device=layer.weight.device)
            state["newton_fallbacks"] = torch.zeros((), dtype=torch.int64, device=layer.weight.device)
        return state

    def refresh(self, state: State, damping: float) -> None:
        """`inverse_i` <- (H_i + lambda_i I)^(-exponent)."""
        newton = self.root == "newton"
        if newton:
            state["residual"].zero_()
        factors, levels = self._matrices(state, "factor"), self._damping_levels(state, damping)
        for mode, (factor, asked) in enumerate(zip(factors, levels, strict=True)):
            level = above_rounding(asked, factor, self.dtype)
            if newton and factor.shape[-1] > 1:
                root = self._newton_root(state, factor, level)
            else:
                root = damped_inverse_power(factor, level.unsqueeze(-1), self.exponent)
            state[f"inverse_{mode}"].copy_(root)

    def _relative_damping(self, scale: Tensor, damping: float) -> list[Tensor]:
        """lambda_i is `damping` times the mean eigenvalue of H_i if `scale` is the mean square."""
        total = damping * scale * self._entries(scale)
        return [total / length for length in self._lengths(scale)]

    def _newton_root(self, state: State, factor: Tensor, level: Tensor) -> Tensor:
        damped = add_to_diagonal(factor, level.unsqueeze(-1))
        roots, residuals = newton_inverse_root(damped, round(1 / self.exponent))
        failed = ~(residuals <= self.tolerance)
        if failed.any():
            roots[failed] = inverse_power(damped[failed], self.exponent)
            _warn(float(residuals.max()), self.tolerance)
        state["residual"].copy_(torch.maximum(state["residual"], residuals.amax(-1)))
        state["newton_fallbacks"].add_(failed.sum(-1))
        return roots


def _warn(residual: float, tolerance: float) -> None:
    warnings.warn(
        f"a root by Newton iteration has residual {residual:.1g} > {tolerance:.1g}, so it was computed by "
        'eigendecomposition; raise the damping or use root="eigen". optimizer.diagnostics() counts all such '
        "roots",
        RuntimeWarning,
        stacklevel=2,
    )


class Shampoo(ModeOptimizer):
    """Shampoo: W <- W - lr M x_1 (H_1 + lambda_1 I)^(-1/(2K)) ... x_K (H_K + lambda_K I)^(-1/(2K)).

    A weight is read as a tensor of K modes: (out, in) of a Linear, (out, in k1 k2) of a convolution.
    H_i = E[mat_i(D) mat_i(D)^T] is a running mean over mini-batch gradients D, or with `fisher="empirical"`
    or "sampled" over the gradients of samples. Gupta, Koren, Singer 2018, arXiv 1802.09568; the published
    settings as arguments: docs/methods.md.

    `lr` is in step lengths of `graft`. `damping` is lambda, or with `relative_damping` the fraction of the
    mean eigenvalue of H_i that lambda_i is.

    For W [out, in] in blocks of [w_1, w_2], with H_i [w_i, w_i]: a step and an observation cost
    O(out in (w_1 + w_2)). A refresh costs O(w_1^3 + w_2^3) for each block, and the state has
    2 (w_1^2 + w_2^2) numbers for each block. Raises ValueError for options that exclude each other.
    """

    damping: float = option(default=1e-3)
    power: float = option(
        default=0.5, meaning="Exponent of the inverse curvature: that of each of K modes is power / K."
    )
    exponent: float | None = option(
        default=None,
        above=0,
        note="1 / (2K) for the published root of each of K modes",
        meaning="Exponent of every mode, in place of power / K.",
    )
    root: Literal["eigen", "newton"] = option(
        default="eigen",
        meaning='How roots are computed: "eigen", by eigendecomposition; "newton", by the coupled Newton '
        "iteration, where 1 / exponent must be whole (by eigendecomposition if its residual is above 0.1).",
    )
    eigenbasis: bool = option(
        default=False, meaning="Take the steps of SOAP, which is Adam in the eigenbasis of the factors."
    )

    def _plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        if options["eigenbasis"]:
            _check_eigenbasis(options)
            return plan_eigenbasis(layer, options)
        reading = choose_reading(layer.shape, options)
        curvature = KroneckerRoots(
            **factor_fields(layer, reading, options),
            exponent=_exponent(layer, reading, options),
            root=options["root"],
        )
        return plan_of(curvature, options["max_dim"], choose_schedule(curvature, options))


def _exponent(layer: Layer, reading: TensorReading, options: dict[str, Any]) -> float:
    exponent: float = options["exponent"] or options["power"] / reading.order
    if options["root"] == "newton" and abs(1 / exponent - round(1 / exponent)) > 1e-6:
        raise ValueError(
            f'root="newton" needs an exponent of 1 / p with a whole number p, got {exponent:g} for '
            f'{layer.name}: pass such an exponent, or root="eigen"'
        )
    return exponent


def _check_eigenbasis(options: dict[str, Any]) -> None:
    for name, only in (("exponent", None), ("root", "eigen"), ("fisher", "gradient")):
        if options[name] != only:
            raise ValueError(
                f"{name}={options[name]!r} has no meaning with eigenbasis=True: leave it at {only!r}"
            )
