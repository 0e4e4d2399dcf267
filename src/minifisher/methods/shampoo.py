"""Shampoo: a root of a second moment for each mode of a weight.

Sources: Gupta, Koren, Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", ICML 2018, arXiv
1802.09568; Anil, Gupta, Koren, Regan, Singer, "Scalable Second Order Optimization for Deep Learning", 2020,
arXiv 2002.09018.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from minifisher.curvature import Plan
from minifisher.linalg.dense import NO_CURVATURE, add_to_diagonal, inverse_power, working_dtype
from minifisher.linalg.modes import TensorReading
from minifisher.linalg.newton import newton_inverse_root
from minifisher.methods.mode_factors import (
    ModeFactors,
    choose_reading,
    choose_schedule,
    damped_power,
)
from minifisher.methods.soap import plan_eigenbasis
from minifisher.optimizer import CurvatureOptimizer
from minifisher.options import option
from minifisher.statistics.records import BatchGradient, LayerSamples

if TYPE_CHECKING:
    from torch import Tensor

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer

_RESIDUAL = 0.1  # of a Newton root that is still used; in float32 a condition number of about 1e6


@dataclass(frozen=True)
class KroneckerRoots(ModeFactors):
    """Shampoo: M x_i (H_i + lambda_i I)^(-exponent) for every mode i (Gupta et al., 2018, Algorithm 2).

    The published exponent is 1 / (2K). `root="newton"` finds the roots by the coupled Newton iteration;
    where the measured residual exceeds the tolerance they are found by eigendecomposition, and counted.
    """

    exponent: float = 0.25
    root: str = "eigen"
    tolerance: float = _RESIDUAL

    def init(self, layer: Layer) -> State:
        """With "newton" also `residual`, the worst of a refresh, and `newton_fallbacks`, all so far: []."""
        state = super().init(layer)
        if self.root == "newton":
            state["residual"] = torch.zeros((), dtype=torch.float32, device=layer.weight.device)
            state["newton_fallbacks"] = torch.zeros((), dtype=torch.int64, device=layer.weight.device)
        return state

    def refresh(self, state: State, damping: float) -> None:
        """`inverse_i` <- (H_i + lambda_i I)^(-exponent)."""
        find = self._newton if self.root == "newton" else self._eigen
        if self.root == "newton":
            state["residual"].zero_()
        factors, levels = self._factors(state), self._damping(state, damping)
        for mode, (factor, level) in enumerate(zip(factors, levels, strict=True)):
            state[f"inverse_{mode}"].copy_(find(state, factor, level))

    def _damping(self, state: State, damping: float) -> list[Tensor]:
        """lambda_i of every block, [..., blocks]: as given, or relative to the mean eigenvalue of H_i.

        Relative: `damping` times the average of the block's mean and what it would be if its entries were
        of the layer's mean square, so that a block without curvature (dead units) is damped as its layer
        is.
        """
        block, layer = self._mean_squares(state)
        if not self.relative_damping:
            return [block.new_tensor(damping).expand_as(block)] * self.reading.order
        level = damping * (0.5 * (block + layer)).clamp_min(NO_CURVATURE) * self._entries(block)
        return [level / length for length in self._lengths(block)]

    def _eigen(self, state: State, factor: Tensor, level: Tensor) -> Tensor:
        return damped_power(factor, level, self.exponent)

    def _newton(self, state: State, factor: Tensor, level: Tensor) -> Tensor:
        if factor.shape[-1] == 1:
            return damped_power(factor, level, self.exponent)
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
        f"a root by Newton iteration has residual {residual:.1g} > {tolerance:.1g}: it was found by "
        'eigendecomposition; raise the damping or use root="eigen". optimizer.diagnostics() counts on',
        RuntimeWarning,
        stacklevel=2,
    )


class Shampoo(CurvatureOptimizer):
    """Shampoo: W <- W - lr M x_1 (H_1 + lambda_1 I)^(-1/(2K)) ... x_K (H_K + lambda_K I)^(-1/(2K)).

    Gupta, Koren, Singer 2018, arXiv 1802.09568. A weight is a tensor of K modes: (out, in) of a Linear,
    (out, in k_1 k_2) of a convolution, or what `merge_dims` makes of it: neighbouring dimensions are
    merged, the last ones first, while their product stays within it (9: the published (out, in, k_1 k_2) of
    3x3 kernels; 1: every dimension is a mode). H_i is the running mean of mat_i(D) mat_i(D)^T, D the
    mini-batch gradient ("gradient"), or of its samples ("empirical", "sampled"). Dimensions above `max_dim`
    are cut into blocks, each a tensor of its own; None chooses, and gives vectors a diagonal; a large
    number the full matrix for vectors, too.

    The exponent of every mode is power / K, or `exponent` where given. `root`: "eigen", by
    eigendecomposition, or "newton", by the coupled Newton iteration, for which 1 / exponent must be whole;
    roots whose measured residual is above 0.1 are found by eigendecomposition, and counted in
    `diagnostics()`. `eigenbasis=True` is SOAP: see there.

    `damping` is lambda, or with `relative_damping` the fraction of the mean eigenvalue of H_i that lambda_i
    is. `lr` is in step lengths of `graft`. For [out, in] with blocks of [w_1, w_2], H_i [w_i, w_i]: a step
    and an observation cost O(out in (w_1 + w_2)), a refresh O(w_1^3 + w_2^3) a block, memory 2 (w_1^2 +
    w_2^2) a block of w_1 w_2 weights.
    """

    damping: float = option(default=1e-3)
    power: float = option(
        default=0.5,
        above=0,
        note="1 for the inverse, 0.5 for the inverse root",
        meaning="Power of the inverse curvature.",
    )
    exponent: float | None = option(
        default=None,
        above=0,
        note="1 / (2K) for the published root of each of K modes",
        meaning="Exponent of every mode; None: power / K.",
    )
    root: Literal["eigen", "newton"] = option(
        default="eigen", meaning="Roots by eigendecomposition, or by the coupled Newton iteration."
    )
    eigenbasis: bool = option(default=False, meaning="Adam in the eigenbasis of the factors, as SOAP.")
    max_dim: int | None = option(
        default=None, at_least=1, meaning="Longer dimensions are cut into blocks; None chooses."
    )
    merge_dims: int | None = option(
        default=None,
        at_least=1,
        meaning="Neighbouring dimensions are merged while their product is at most this; None: (out, rest).",
    )

    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """A root, or a basis, for each mode of a weight, in blocks that memory allows."""
        if options["eigenbasis"]:
            _check_eigenbasis(options)
            return plan_eigenbasis(layer, options)
        reading, structure, reason = choose_reading(layer.shape, options)
        from_gradient = options["fisher"] == "gradient" or not layer.reads_samples
        curvature = KroneckerRoots(
            reading=reading,
            shape=layer.shape,
            needs=BatchGradient if from_gradient else LayerSamples,
            dtype=options["curvature_dtype"] or working_dtype(layer.weight.dtype),
            relative_damping=options["relative_damping"],
            exponent=_exponent(layer, reading, options),
            root=options["root"],
        )
        schedule = choose_schedule(reading, from_gradient, options)
        return Plan(curvature, structure, reason, reading.blocks, max(reading.widths), *schedule)


def _exponent(layer: Layer, reading: TensorReading, options: dict[str, Any]) -> float:
    exponent: float = options["exponent"] or options["power"] / reading.order
    if options["root"] == "newton" and abs(1 / exponent - round(1 / exponent)) > 1e-6:
        raise ValueError(
            f'root="newton" needs an exponent of 1 / p with p whole, got {exponent:g} for {layer.name}: '
            'pass such an exponent, or root="eigen"'
        )
    return exponent


def _check_eigenbasis(options: dict[str, Any]) -> None:
    for name, only in (("exponent", None), ("root", "eigen"), ("fisher", "gradient")):
        if options[name] != only:
            raise ValueError(
                f"{name}={options[name]!r} has no meaning with eigenbasis=True: leave it at {only!r}"
            )
