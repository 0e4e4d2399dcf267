"""K-BFGS: the inverse Hessian of a layer as a Kronecker product of two BFGS matrices.

Source: Goldfarb, Ren, Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural Networks",
NeurIPS 2020, arXiv 2006.08877. Convolutions follow KFAC's patches, which is our reading: see docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from minifisher.curvature import Curvature, Plan, no_curvature
from minifisher.linalg.bfgs import (
    bfgs_update,
    dot,
    double_damped,
    reciprocal,
    times,
    unit,
)
from minifisher.linalg.dense import NO_CURVATURE, add_to_diagonal, inverse_power, working_dtype
from minifisher.optimizer import CurvatureOptimizer
from minifisher.options import option
from minifisher.statistics.records import LayerSamples, Secant, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer

# What is chosen where the user says nothing; docs/methods.md has the measurements.
_STATISTICS_EVERY = 4
_INVERSE_EVERY = 20
# What rounding leaves of a mean of zero, in units of eps and the root mean square: up to 1.4 was measured.
_ROUNDINGS = 4


@dataclass(frozen=True)
class KroneckerBFGS(Curvature):
    """H = H_a (x) H_g for each group of a layer; direction H_g M H_a.

    H_a: the inverse of A + gamma_A I with A = E[(1/N) sum_ns a_ns a_ns^T], exact at first and then by BFGS on
    the Hessian action s = H_a v, y = (A + gamma_A I) s, v = mean a (2020, Section 3); the input of a folded
    bias counts in v as the 1 that it is, or `averages_bias` (published code) as the mean of the others.
    H_g: BFGS on averages of s = mean h' - mean h and y = mean g' - mean g, double damped (Section 4), with
    mu2 = sqrt(lambda). Relative: gamma_A is sqrt(lambda) times the mean of A's diagonal, and y is measured
    in units of the mean of g^2, whose inverse H_g starts from; absolute (published): 1 for both.
    """

    needs = Secant
    averages = ("input_moment", "input_mean", "gradient_moment")

    shape: torch.Size  # [out, ...], of the layer
    groups: int
    dtype: torch.dtype
    relative_damping: bool = True
    mu1: float = 0.2
    inverse_every: int = 20  # refreshes, between which H_a is updated
    averages_bias: bool = False

    structure: ClassVar[str] = "Kronecker BFGS"

    @property
    def block_shape(self) -> tuple[int, int]:
        """Outputs and inputs of one group; a folded bias is an input."""
        return self.shape[0] // self.groups, self.shape[1:].numel()

    @property
    def widest(self) -> int:
        """The largest matrix."""
        return max(self.block_shape)

    def init(self, layer: Layer) -> State:
        """A, mean g^2, s and y are averaged, v is the latest; the inverses are made of them."""
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

    def _zeros(self, layer: Layer, *size: int) -> Tensor:
        return layer.weight.new_zeros((self.groups, *size), dtype=self.dtype)

    # ---- observe ----

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """A, mean g^2, s and y <- decay X + (1 - decay) X_new; v is the latest."""
        if isinstance(statistics, LayerSamples):
            self._observe_samples(state, statistics, decay)
        else:
            assert isinstance(statistics, Secant)
            self._observe_secant(state, statistics, decay)

    def _observe_samples(self, state: State, samples: LayerSamples, decay: float) -> None:
        moment = mean = square = torch.zeros(())
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
        """Whether y, a difference of means of g, is more than rounding leaves of such sums.

        Before a batch norm it is not: no change of the mean output passes, so that mean g is 0.
        """
        level = _ROUNDINGS * torch.finfo(gradient_change.dtype).eps * state["gradient_moment"].sqrt()
        return (gradient_change.square().mean(-1).sqrt() > level).any()

    # ---- refresh ----

    def refresh(self, state: State, damping: float) -> None:
        """One BFGS update of H_a and one of H_g; at first and every `inverse_every` times H_a is exact."""
        refreshes = int(state["refreshes"].flatten()[0])
        root = damping**0.5
        self._refresh_inputs(state, root, refreshes % self.inverse_every == 0)
        scale = self._unit_of(state["gradient_moment"])
        if not refreshes:
            self._start_outputs(state, scale)
        self._refresh_outputs(state, root, scale)
        state["refreshes"] += 1

    def _refresh_inputs(self, state: State, root: float, exactly: bool) -> None:
        mean_diagonal = state["input_moment"].diagonal(dim1=-2, dim2=-1).mean(-1)
        shift = root * self._unit_of(mean_diagonal)
        damped = add_to_diagonal(state["input_moment"], shift.unsqueeze(-1))
        inverse = state["input_inverse"]
        if exactly:
            inverse.copy_(inverse_power(damped, 1.0))
        else:
            change = times(inverse, state["input_mean"])
            _keep_finite(inverse, bfgs_update(inverse, *unit(change, times(damped, change))))

    def _refresh_outputs(self, state: State, root: float, scale: Tensor) -> None:
        """One pair into H_g, double damped in units of `scale` [..., groups]."""
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

    def _unit_of(self, means: Tensor) -> Tensor:  # [..., groups]
        """Relative: the average of the group's mean and the layer's; absolute: 1."""
        if not self.relative_damping:
            return torch.ones_like(means)
        return (0.5 * (means + means.mean(-1, keepdim=True))).clamp_min(NO_CURVATURE)

    def _start_outputs(self, state: State, scale: Tensor) -> None:
        """H_g = I / scale."""
        state["output_inverse"].zero_()
        state["output_inverse"].diagonal(dim1=-2, dim2=-1).copy_(1 / scale.unsqueeze(-1))

    def _learn(self, state: State, change: Tensor, gradient_change: Tensor, scale: Tensor) -> Tensor:
        """The pair into H_g; which were taken, [..., groups]."""
        updated = bfgs_update(state["output_inverse"], change, gradient_change)
        finite = _keep_finite(state["output_inverse"], updated)
        return finite & (reciprocal(change, gradient_change).squeeze(-1) > 0)

    # ---- precondition ----

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """H_g M H_a."""
        leading = direction.shape[: direction.ndim - len(self.shape)]
        matrix = direction.reshape(*leading, self.groups, *self.block_shape).to(self.dtype)
        product = self._times_outputs(state, matrix) @ state["input_inverse"]
        return product.reshape(direction.shape).to(direction.dtype)

    def _times_outputs(self, state: State, matrix: Tensor) -> Tensor:  # [..., groups, out, k]
        """H_g X."""
        return state["output_inverse"] @ matrix


def _keep_finite(inverse: Tensor, updated: Tensor) -> Tensor:
    """The update in place where all of it is finite, and where that is, [..., groups]."""
    finite = torch.isfinite(updated).all(-1).all(-1)
    inverse.copy_(torch.where(finite[..., None, None], updated, inverse))
    return finite


class KroneckerBFGSOptimizer(CurvatureOptimizer):
    """What KBFGS and KBFGSL share: the choice between a BFGS curvature and the first-order step."""

    folds = ("linear", "convolution")
    estimators = ("empirical",)  # secants and inputs come from the training loss's own backward pass

    curvature_decay: float = option(default=0.9)
    damping: float = option(default=1.0)
    fisher: Literal["gradient", "empirical", "sampled", "exact"] = option(default="empirical", init=False)
    fold_bias: bool = option(default=True)
    mu1: float = option(default=0.2, at_least=0, below=1, meaning="Threshold of the first damping of pairs.")
    bias_input: Literal["one", "mean"] = option(
        default="one", meaning="The input of a folded bias in the mean input: 1, or the mean of the others."
    )
    max_dim: int | None = option(
        default=8192, at_least=1, meaning="A layer with a wider matrix takes the first-order step."
    )

    def _curvature(self, common: dict[str, Any], options: dict[str, Any]) -> KroneckerBFGS:
        return KroneckerBFGS(**common)

    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """Two BFGS matrices where the samples of a layer can be read, else the first-order step."""
        if not layer.reads_samples:
            return no_curvature(layer.note)
        every = options["statistics_every"] or _STATISTICS_EVERY
        inverse_every = options["inverse_every"] or _INVERSE_EVERY
        common = {
            "shape": layer.shape,
            "groups": layer.groups,
            "dtype": _dtype(layer, options["curvature_dtype"]),
            "relative_damping": options["relative_damping"],
            "mu1": options["mu1"],
            "inverse_every": max(1, inverse_every // every),
            "averages_bias": layer.bias is not None and options["bias_input"] == "mean",
        }
        curvature = self._curvature(common, options)
        outputs, inputs = curvature.block_shape
        if curvature.widest > (options["max_dim"] or curvature.widest):
            return no_curvature(f"a matrix of {curvature.widest} is above max_dim={options['max_dim']}")
        reason = f"inputs {inputs}, outputs {outputs}; H_a inverted every {inverse_every} steps"
        return Plan(curvature, curvature.structure, reason, layer.groups, outputs * inputs, every, every)


class KBFGS(KroneckerBFGSOptimizer):
    """Kronecker-factored BFGS: W <- W - lr H_g M H_a for every layer, without a Fisher matrix of the outputs.

    Goldfarb, Ren, Bahamou 2020, arXiv 2006.08877. For a Linear W [out, in] (a bias folded in is one more
    input), with inputs a, outputs h = W a and output gradients g of the samples:

        A <- beta A + (1 - beta) mean a a^T             # [in, in]
        H_a ~ (A + gamma_A I)^-1                        # [in, in], BFGS on s = H_a v, y = (A + gamma_A I) s
        s, y: averages of mean h' - mean h, mean g' - mean g    # [out], ' is after the step
        H_g <- (I - s y^T / s^T y) H_g (I - y s^T / s^T y) + s s^T / s^T y    # [out, out]

    A convolution reads as KFAC's patches: A sums over positions, s and y are means over them (our reading);
    with groups, every group has its own pair of matrices. All else takes the graft's first-order step.

    `step(closure)` is needed: after the step it evaluates the closure again, on the same mini-batch. That
    second pass leaves `.grad` of the parameters, the module's buffers (running statistics of batch norm) and
    torch's random numbers as the first one left them, and draws the same dropout masks; whatever else the
    closure does (fetch the next batch, write a log) happens twice. Pairs whose s^T y would break positive
    definiteness are damped twice (`mu1`, and mu2 = sqrt(lambda)); none is dropped in silence: `diagnostics()`
    counts pairs, damped_pairs and skipped_pairs (not a number, no curvature left, or y lost in rounding, as
    before a batch norm) for each weight.

    Costs of a layer, for N samples of S positions: a second pass, O(N S in^2) for A and O(in^2 + out^2) for
    the updates every `statistics_every` steps; O(in^3) for the exact H_a every `inverse_every` steps (a
    number beyond the last step: once, as published); O(out in (in + out)) a step. Memory 2 in^2 + out^2
    numbers. `damping` is lambda: gamma_A = sqrt(lambda); with `relative_damping` gamma_A is that times the
    mean diagonal of A, and H_g is measured in units of the mean of g^2. `bias_input` is what v has for the
    bias's input: "one", which it is, or "mean", the mean of the other inputs, as the published code has it. A
    layer wider than `max_dim` takes the first-order step. The published algorithm as arguments:
    docs/methods.md. Raises TypeError where `step` gets no closure, ValueError where `params` hold no module
    that it can look into.
    """


def _dtype(layer: Layer, wanted: torch.dtype | None) -> torch.dtype:
    if wanted == torch.bfloat16:
        raise ValueError(
            "curvature_dtype of a BFGS matrix must be float32, float64 or None, got bfloat16: rounded so, "
            "it would not stay positive definite"
        )
    return wanted or working_dtype(layer.weight.dtype)
