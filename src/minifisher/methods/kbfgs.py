"""K-BFGS: the inverse Hessian matrix of a layer as the Kronecker product of two BFGS matrices.

Source: Goldfarb, Ren, Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural Networks",
NeurIPS 2020, arXiv 2006.08877. The patches of convolutions are those of KFAC, which is our reading: see
docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from minifisher.linalg.bfgs import bfgs_update, dot, double_damped, reciprocal, times, unit
from minifisher.linalg.dense import add_to_diagonal, inverse_power
from minifisher.methods.choices import curvature_dtype
from minifisher.methods.kronecker import KroneckerCurvature, KroneckerOptimizer, scale_of_groups
from minifisher.options import option
from minifisher.statistics.records import LayerSamples, Secant, Statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from minifisher.curvature import Plan, State
    from minifisher.statistics.layers import Layer

# Defaults; docs/methods.md has the measurements.
_STATISTICS_EVERY = 4
_INVERSE_EVERY = 20
# The mean of numbers that sum to zero is a rounding error, in float arithmetic up to 1.4 eps times their root
# mean square (measured). Anything below this many eps is taken for such an error.
_ROUNDING_ERRORS = 4


@dataclass(frozen=True)
class KroneckerBFGS(KroneckerCurvature):
    """The inverse Hessian H = H_a (x) H_g of each group of a layer; the direction is H_g M H_a.

    H_a approximates (A + gamma_A I)^-1, A = E[(1/N) sum_ns a_ns a_ns^T]. It is exact at first, and later
    updated by BFGS with s = H_a v, y = (A + gamma_A I) s, v = mean a (2020, Section 3). In v, the input of a
    folded bias is 1, or with `averages_bias` the mean of the other inputs (published code).

    H_g is updated by BFGS with the averages of s = mean h' - mean h and y = mean g' - mean g. Pairs are
    double damped, with mu2 = sqrt(lambda) (Section 4).

    Absolute damping, as published: gamma_A = sqrt(lambda), and H_g starts from I. Relative: gamma_A is
    sqrt(lambda) times the mean of A's diagonal, H_g starts from I / mean g^2, and y / mean g^2 takes the
    place of y in the conditions of double damping.
    """

    needs: type[Statistics] = field(default=Secant, init=False)
    averages: ClassVar[tuple[str, ...]] = ("input_moment", "input_mean", "gradient_moment")
    recomputed: ClassVar[tuple[str, ...]] = ("input_inverse",)
    structure: ClassVar[str] = "Kronecker BFGS"

    mu1: float = 0.2
    inverse_every: int = 20  # refreshes between two exact H_a
    averages_bias: bool = False

    def matrices(self, state: State) -> Sequence[Tensor]:
        """A; there is no second moment of output gradients."""
        return (state["input_moment"],)

    def init(self, layer: Layer) -> State:
        """Averages of A, g^2, s and y; the latest v; H_a and H_g; and counts."""
        outputs, inputs = self.block_shape
        state = {
            "input_moment": self._zeros(layer, inputs, inputs),
            "input_mean": self._zeros(layer, inputs),
            "input_inverse": self._zeros(layer, inputs, inputs),
            "gradient_moment": self._zeros(layer),
            "output_change": self._zeros(layer, outputs),
            "gradient_change": self._zeros(layer, outputs),
        }
        counts = ("refreshes", "pairs", "damped_pairs", "skipped_pairs")
        state.update({name: layer.weight.new_zeros((), dtype=torch.int64) for name in counts})
        state["pair_is_new"] = layer.weight.new_zeros((), dtype=torch.bool)
        return {**state, **self._init_outputs(layer)}

    def _init_outputs(self, layer: Layer) -> State:
        outputs, _ = self.block_shape
        return {"output_inverse": self._zeros(layer, outputs, outputs)}

    # ---- observe ----

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """X <- decay X + (1 - decay) X_new for A, mean g^2, s and y; v is replaced."""
        if isinstance(statistics, LayerSamples):
            self._observe_samples(state, statistics, decay)
        else:
            assert isinstance(statistics, Secant)
            self._observe_secant(state, statistics, decay)

    def _observe_samples(self, state: State, samples: LayerSamples, decay: float) -> None:
        moment = mean = square = torch.zeros((), device="cpu")  # wherever torch.set_default_device points
        positions = 0
        for inputs, gradients in samples.chunks():
            a = inputs.transpose(0, 1).flatten(1, 2)  # [groups, n s, in]
            moment, mean = moment + a.mT @ a, mean + a.sum(1)
            square = square + gradients.square().sum((0, 2, 3))
            positions += a.shape[1]
        state["input_moment"].lerp_((moment / samples.count).to(self.dtype), 1 - decay)
        mean = mean / positions
        if self.averages_bias:
            mean[..., -1] = mean[..., :-1].mean(-1)
        state["input_mean"].copy_(mean)
        square = square / (positions * self.block_shape[0])
        state["gradient_moment"].lerp_(square.to(self.dtype), 1 - decay)

    def _observe_secant(self, state: State, secant: Secant, decay: float) -> None:
        change, gradient_change = secant.output_change, secant.gradient_change
        usable = torch.isfinite(change).all() & torch.isfinite(gradient_change).all()
        usable &= self._above_rounding(state, gradient_change)
        for name, fresh in (("output_change", change), ("gradient_change", gradient_change)):
            state[name].lerp_(torch.where(usable, fresh.to(self.dtype), state[name]), 1 - decay)
        state["skipped_pairs"] += ~usable
        state["pair_is_new"].copy_(usable)

    @staticmethod
    def _above_rounding(state: State, gradient_change: Tensor) -> Tensor:
        """Whether any y is more than the rounding error of a mean of g.

        Before a batch norm it is not. The loss does not depend on the mean output there, so mean g is 0.
        """
        level = _ROUNDING_ERRORS * torch.finfo(gradient_change.dtype).eps * state["gradient_moment"].sqrt()
        return (gradient_change.square().mean(-1).sqrt() > level).any()

    # ---- refresh ----

    def refresh(self, state: State, damping: float) -> None:
        """Update H_a and H_g by BFGS; the first time, and then every `inverse_every` times, H_a is exact."""
        refreshes = int(state["refreshes"].flatten()[0])
        root = damping**0.5
        self._refresh_inputs(state, root, refreshes % self.inverse_every == 0)
        scale = self._scale(state["gradient_moment"])
        if not refreshes:
            self._start_outputs(state, scale)
        self._refresh_outputs(state, root, scale)
        state["refreshes"] += 1

    def _refresh_inputs(self, state: State, root: float, exactly: bool) -> None:
        mean_diagonal = state["input_moment"].diagonal(dim1=-2, dim2=-1).mean(-1)
        level = root * self._scale(mean_diagonal)
        damped = add_to_diagonal(state["input_moment"], level.unsqueeze(-1))
        inverse = state["input_inverse"]
        if exactly:
            inverse.copy_(inverse_power(damped, 1.0))
        else:
            change = times(inverse, state["input_mean"])
            _keep_finite(inverse, bfgs_update(inverse, *unit(change, times(damped, change))))

    def _refresh_outputs(self, state: State, root: float, scale: Tensor) -> None:
        """Update H_g by the pair, which is double damped in units of `scale`, [..., groups]."""
        units = scale.unsqueeze(-1)
        new = state["pair_is_new"][..., None, None]
        s, y = unit(state["output_change"] * new, state["gradient_change"] * new)
        product = self._times_outputs(state, y.unsqueeze(-1)).squeeze(-1)
        s, y, damped = double_damped(s, y / units, product, self.mu1, root)
        known = dot(s, s).squeeze(-1) > 0
        taken = self._learn(state, s, y * units, scale)
        state["pairs"] += known.sum(-1)
        state["damped_pairs"] += (known & damped).sum(-1)
        state["skipped_pairs"] += (known & ~taken).sum(-1)
        state["pair_is_new"].zero_()

    def _scale(self, means: Tensor) -> Tensor:  # [..., groups]
        return scale_of_groups(means) if self.relative_damping else torch.ones_like(means)

    def _start_outputs(self, state: State, scale: Tensor) -> None:
        """H_g = I / scale."""
        state["output_inverse"].zero_()
        state["output_inverse"].diagonal(dim1=-2, dim2=-1).copy_(1 / scale.unsqueeze(-1))

    def _learn(self, state: State, change: Tensor, gradient_change: Tensor, scale: Tensor) -> Tensor:
        """Update H_g by a pair; returns where it was used, [..., groups]."""
        updated = bfgs_update(state["output_inverse"], change, gradient_change)
        finite = _keep_finite(state["output_inverse"], updated)
        return finite & (reciprocal(change, gradient_change).squeeze(-1) > 0)

    # ---- precondition ----

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """H_g M H_a."""
        matrix = self._read(direction).to(self.dtype)
        product = self._times_outputs(state, matrix) @ state["input_inverse"]
        return product.reshape(direction.shape).to(direction.dtype)

    def _times_outputs(self, state: State, matrix: Tensor) -> Tensor:  # [..., groups, out, k]
        """H_g X."""
        return state["output_inverse"] @ matrix


def _keep_finite(inverse: Tensor, updated: Tensor) -> Tensor:
    """Replace each matrix by its update if that is finite; returns where it is, [..., groups]."""
    finite = torch.isfinite(updated).all(-1).all(-1)
    inverse.copy_(torch.where(finite[..., None, None], updated, inverse))
    return finite


class KroneckerBFGSOptimizer(KroneckerOptimizer):
    """The options and the plan of KBFGS and KBFGSL."""

    estimators: ClassVar[tuple[str, ...]] = ("empirical",)  # the second pass repeats the training loss

    curvature_decay: float = option(default=0.9)
    damping: float = option(default=1.0)
    fisher: Literal["gradient", "empirical", "sampled", "exact"] = option(default="empirical", init=False)
    mu1: float = option(
        default=0.2,
        at_least=0,
        below=1,
        meaning="A pair is damped where s^T y < mu1 y^T H_g y (the first of the two dampings).",
    )
    bias_input: Literal["one", "mean"] = option(
        default="one",
        meaning='Input of a folded bias in the mean input v: "one", its value, or "mean", the mean of the '
        "other inputs, as in the published code.",
    )

    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """Two BFGS matrices, or the first-order step if a layer has no samples or too wide matrices."""
        plan = super().plan(layer, options)
        if not isinstance(plan.curvature, KroneckerBFGS):
            return plan
        steps = plan.curvature.inverse_every * plan.statistics_every
        return replace(plan, reason=f"{plan.reason}; H_a inverted every {steps} steps")

    def _schedule(self, options: dict[str, Any]) -> tuple[int, int]:
        """Every observation is followed by an update of H_a and H_g."""
        every: int = options["statistics_every"] or _STATISTICS_EVERY
        return every, every

    def _curvature(self, layer: Layer, options: dict[str, Any]) -> KroneckerBFGS:
        return KroneckerBFGS(**self._fields(layer, options))

    def _fields(self, layer: Layer, options: dict[str, Any]) -> dict[str, Any]:
        if options["curvature_dtype"] == torch.bfloat16:
            raise ValueError(
                "curvature_dtype of a BFGS matrix must be float32, float64 or None, got bfloat16: rounded to "
                "it, the matrix would not stay positive definite"
            )
        updates_every, _ = self._schedule(options)
        return {
            "shape": layer.shape,
            "groups": layer.groups,
            "dtype": curvature_dtype(layer, options),
            "relative_damping": options["relative_damping"],
            "mu1": options["mu1"],
            "inverse_every": max(1, (options["inverse_every"] or _INVERSE_EVERY) // updates_every),
            "averages_bias": layer.bias is not None and options["bias_input"] == "mean",
        }


class KBFGS(KroneckerBFGSOptimizer):
    """Kronecker-factored BFGS: W <- W - lr H_g M H_a, with BFGS matrices for the two sides of a layer.

    For W [out, in] of a Linear, with inputs a, outputs h = W a and output gradients g of the samples:

        A <- beta A + (1 - beta) mean a a^T                         # [in, in]
        H_a ~ (A + gamma_A I)^-1                                    # [in, in]
              updated by BFGS with v = mean a, s = H_a v, y = (A + gamma_A I) s
        s, y: averages of mean h' - mean h and mean g' - mean g     # [out], ' means after the step
        H_g <- (I - s y^T / s^T y) H_g (I - y s^T / s^T y) + s s^T / s^T y    # [out, out]

    Goldfarb, Ren, Bahamou 2020, arXiv 2006.08877; the published algorithm as arguments: docs/methods.md. A
    convolution is read as in KFAC: A sums over positions, s and y are means over them (our reading). Each
    group of a grouped convolution has its own two matrices. Every other weight takes the first-order step.

    `step` needs a closure. After the step it calls the closure again, on the same mini-batch. This second
    pass restores the `.grad` of the parameters, the buffers of the module (such as the running statistics of
    batch norm) and torch's random numbers; dropout masks are those of the first pass. Other effects of the
    closure, such as fetching the next batch or writing a log, happen twice.

    A pair with too small s^T y would make H_g indefinite: it is damped twice, with `mu1` and with mu2 =
    sqrt(lambda). A pair is skipped if it is not finite or only a rounding error, as before a batch norm.
    `diagnostics()` counts pairs, damped_pairs and skipped_pairs of each weight.

    `lr` is in step lengths of `graft`. `damping` is lambda: gamma_A = sqrt(lambda), with `relative_damping`
    times the mean of A's diagonal.

    For N samples and S positions: the state has 2 in^2 + out^2 numbers. A step costs O(out in (in + out));
    every `statistics_every` steps, a second pass and O(N S in^2 + out^2); every `inverse_every` steps,
    O(in^3) for an exact H_a (published: only once, so `inverse_every` is larger than the number of steps).
    Raises TypeError if `step` gets no closure, ValueError for parameters without their nn.Module.
    """
