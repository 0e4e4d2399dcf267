"""K-BFGS and K-BFGS(L): the inverse Hessian of a layer as a Kronecker product of two BFGS matrices.

Source: Goldfarb, Ren, Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural Networks", NeurIPS 2020,
arXiv 2006.08877. Convolutions follow KFAC's patches, which is our reading: see docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from minifisher.curvature import Curvature, FirstOrder, Plan
from minifisher.linalg.bfgs import (
    bfgs_update,
    dot,
    double_damped,
    limited_memory_middle,
    limited_memory_product,
    reciprocal,
    times,
    unit,
)
from minifisher.linalg.spd import add_to_diagonal, inverse_power
from minifisher.optimizer import CurvatureOptimizer
from minifisher.statistics.records import LayerSamples, Secant, Statistics

if TYPE_CHECKING:
    from torch import Tensor

    from minifisher.arguments import Params
    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer

# Inputs or gradients that are all zero have no scale of their own, and the direction is zero as well.
_NO_CURVATURE = 1e-30


@dataclass(frozen=True)
class KroneckerBFGS(Curvature):
    """H = H_a (x) H_g for each group of a layer; direction H_g M H_a.

    H_a: the inverse of A + gamma_A I with A = E[(1/N) sum_ns a_ns a_ns^T], exact at first and then by BFGS on
    the Hessian action s = H_a v, y = (A + gamma_A I) s, v = mean a (2020, Section 3).
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
    inverse_every: int | None = None  # refreshes; None: H_a is inverted once

    @property
    def block_shape(self) -> tuple[int, int]:
        """Outputs and inputs of one group; a folded bias is an input."""
        return self.shape[0] // self.groups, self.shape[1:].numel()

    def init(self, layer: Layer) -> State:
        """A, v, mean g^2, s and y are averaged or measured, the inverses made of them; the counts are counts."""
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
        state["input_mean"].copy_(mean / positions)
        square = square / (positions * self.block_shape[0])
        state["gradient_moment"].lerp_(square.to(self.dtype), 1 - decay)

    def _observe_secant(self, state: State, secant: Secant, decay: float) -> None:
        change, gradient_change = secant.output_change, secant.gradient_change
        usable = torch.isfinite(change).all() & torch.isfinite(gradient_change).all()
        for name, fresh in (("output_change", change), ("gradient_change", gradient_change)):
            state[name].lerp_(torch.where(usable, fresh.to(self.dtype), state[name]), 1 - decay)
        state["skipped_pairs"] += ~usable

    # ---- refresh ----

    def refresh(self, state: State, damping: float) -> None:
        """One BFGS update of H_a and one of H_g; the first time, and every `inverse_every`, H_a is inverted."""
        refreshes = int(state["refreshes"].flatten()[0])
        root = damping**0.5
        self._refresh_inputs(state, root, refreshes % (self.inverse_every or refreshes + 1) == 0)
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
        s, y = unit(state["output_change"], state["gradient_change"])
        product = self._times_outputs(state, y.unsqueeze(-1)).squeeze(-1)
        s, y, damped = double_damped(s, y / units, product, self.mu1, root)
        known = dot(s, s).squeeze(-1) > 0
        taken = self._learn(state, s, y * units, scale)
        state["pairs"] += known.sum(-1)
        state["damped_pairs"] += (known & damped).sum(-1)
        state["skipped_pairs"] += (known & ~taken).sum(-1)

    def _unit_of(self, means: Tensor) -> Tensor:  # [..., groups]
        """Relative: the average of the group's mean and the layer's; absolute: 1."""
        if not self.relative_damping:
            return torch.ones_like(means)
        return (0.5 * (means + means.mean(-1, keepdim=True))).clamp_min(_NO_CURVATURE)

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


@dataclass(frozen=True)
class LimitedMemoryKroneckerBFGS(KroneckerBFGS):
    """H_g from the latest `memory` pairs alone, in compact form: m x out numbers instead of out x out."""

    memory: int = 100

    def _init_outputs(self, layer: Layer) -> State:
        outputs, _ = self.block_shape
        return {
            "output_changes": self._zeros(layer, self.memory, outputs),
            "gradient_changes": self._zeros(layer, self.memory, outputs),
            "middle": self._zeros(layer, 2 * self.memory, 2 * self.memory),
            "initial_inverse": self._zeros(layer),
        }

    def _start_outputs(self, state: State, scale: Tensor) -> None:
        state["initial_inverse"].copy_(1 / scale)

    def _learn(self, state: State, change: Tensor, gradient_change: Tensor, scale: Tensor) -> Tensor:
        ratio = reciprocal(change, gradient_change)
        taken = ratio > 0
        for name, fresh in (("output_changes", change), ("gradient_changes", gradient_change)):
            # Scaled to s^T y = 1, which is the same pair and keeps the compact form well conditioned.
            later = torch.cat((state[name][..., 1:, :], (fresh * ratio.sqrt()).unsqueeze(-2)), dim=-2)
            state[name].copy_(torch.where(taken.unsqueeze(-1), later, state[name]))
        state["initial_inverse"].copy_(1 / scale)
        state["middle"].copy_(limited_memory_middle(*self._scaled_pairs(state)))
        return taken.squeeze(-1)

    def _times_outputs(self, state: State, matrix: Tensor) -> Tensor:
        pairs = self._scaled_pairs(state)
        return state["initial_inverse"][..., None, None] * limited_memory_product(*pairs, state["middle"], matrix)

    def _scaled_pairs(self, state: State) -> tuple[Tensor, Tensor]:
        """The pairs of gamma^-1 H_g, which start from I, with gamma the initial inverse."""
        root = state["initial_inverse"].sqrt()[..., None, None]
        return state["output_changes"] / root, state["gradient_changes"] * root


def _keep_finite(inverse: Tensor, updated: Tensor) -> Tensor:
    """The update in place where all of it is finite, and where that is, [..., groups]."""
    finite = torch.isfinite(updated).all(-1).all(-1)
    inverse.copy_(torch.where(finite[..., None, None], updated, inverse))
    return finite


class KBFGS(CurvatureOptimizer):
    """TODO."""

    folds = ("linear", "convolution")
    estimators = ("empirical",)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        curvature_decay: float = 0.9,
        damping: float = 0.1,
        relative_damping: bool = True,
        mu1: float = 0.2,
        graft: str | None = "adam",
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        adaptive_damping: bool = False,
        statistics_every: int | None = None,
        inverse_every: int | None = None,
        max_dim: int | None = 8192,
        fold_bias: bool = True,
        curvature_dtype: torch.dtype | None = None,
        maximize: bool = False,
        shard_curvature: bool = False,
        statistics_memory: int = 256 * 2**20,
        **own: Any,
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "curvature_decay": curvature_decay,
            "damping": damping,
            "relative_damping": relative_damping,
            "mu1": mu1,
            "graft": graft,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "adaptive_damping": adaptive_damping,
            "statistics_every": statistics_every,
            "inverse_every": inverse_every,
            "max_dim": max_dim,
            "fold_bias": fold_bias,
            "curvature_dtype": curvature_dtype,
            "maximize": maximize,
            "shard_curvature": shard_curvature,
            "statistics_memory": statistics_memory,
            "fisher": "empirical",
            **own,
        }
        super().__init__(params, options)

    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """Two BFGS matrices where the samples of a layer can be read, else the first-order step."""
        if not layer.reads_samples:
            return _first_order(layer.note)
        half = layer.weight.dtype not in (torch.float32, torch.float64)
        kw = dict(
            shape=layer.shape,
            groups=layer.groups,
            dtype=options["curvature_dtype"] or (torch.float32 if half else layer.weight.dtype),
            relative_damping=options["relative_damping"],
            mu1=options["mu1"],
            inverse_every=options["inverse_every"],
        )
        curvature = LimitedMemoryKroneckerBFGS(**kw, memory=options["memory"]) if "memory" in options else KroneckerBFGS(**kw)
        outputs, inputs = curvature.block_shape
        every = options["statistics_every"] or 1
        return Plan(curvature, "Kronecker BFGS", f"inputs {inputs}, outputs {outputs}", layer.groups, outputs * inputs, every, every)


def _first_order(reason: str) -> Plan:
    return Plan(FirstOrder(), "first-order step", reason, 0, 0, 1, 1)
