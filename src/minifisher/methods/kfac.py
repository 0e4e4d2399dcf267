"""KFAC: the Fisher matrix of a layer as the Kronecker product of two small second moments.

Sources: Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML
2015, arXiv 1503.05671; convolutions: Grosse, Martens, ICML 2016, arXiv 1602.01407; weight sharing:
Eschenhagen, Immer, Turner, Schneider, Hennig, NeurIPS 2023, arXiv 2311.00636; eigenvalue correction: George,
Laurent, Bouthillier, Ballas, Vincent, NeurIPS 2018, arXiv 1806.03884.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from minifisher.curvature import Curvature, Plan, no_curvature
from minifisher.linalg.dense import (
    NO_CURVATURE,
    add_to_diagonal,
    eigendecomposition,
    inverse_power,
    working_dtype,
)
from minifisher.optimizer import CurvatureOptimizer
from minifisher.options import option
from minifisher.statistics.records import LayerSamples, Statistics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer

# Numbers of per-sample gradients that are formed at once where positions share a weight: 16 MiB in float32.
_SCRATCH = 2**22


@dataclass(frozen=True)
class KroneckerFactors(Curvature):
    """F = A (x) G for each group; direction (G + gamma_G I)^(-power) M (A + gamma_A I)^(-power).

    With input a_ns and output gradient g_ns of sample n at the shared position s, of which a sample has S:
    "expand", positions are samples: A = (1/N) sum_ns a_ns a_ns^T, G = (1/NS) sum_ns g_ns g_ns^T;
    "reduce", a_n = mean_s a_ns, g_n = sum_s g_ns: A = (1/N) sum_n a_n a_n^T, G = (1/N) sum_n g_n g_n^T.
    """

    needs = LayerSamples
    averages = ("input_factor", "gradient_factor", "eigenvalues")

    shape: torch.Size  # [out, ...], of the layer
    groups: int
    dtype: torch.dtype
    power: float = 1.0
    relative_damping: bool = True
    pi_correction: bool = True
    weight_sharing: str = "expand"

    @property
    def block_shape(self) -> tuple[int, int]:
        """Outputs and inputs of one group; a folded bias is an input."""
        return self.shape[0] // self.groups, self.shape[1:].numel()

    def init(self, layer: Layer) -> State:
        """A [groups, in, in] and G [groups, out, out] are averaged, the inverses cached."""
        outputs, inputs = self.block_shape
        return {
            "input_factor": self._zeros(layer, inputs, inputs),
            "gradient_factor": self._zeros(layer, outputs, outputs),
            "input_inverse": self._zeros(layer, inputs, inputs),
            "gradient_inverse": self._zeros(layer, outputs, outputs),
        }

    def _zeros(self, layer: Layer, rows: int, columns: int) -> Tensor:
        return layer.weight.new_zeros((self.groups, rows, columns), dtype=self.dtype)

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """A <- decay A + (1 - decay) A_new, and G likewise."""
        assert isinstance(statistics, LayerSamples)
        input_sum = gradient_sum = torch.zeros(())
        positions = 0
        for a, g in self._chunks(statistics):
            a, g = (part.transpose(0, 1).flatten(1, 2) for part in (a, g))  # [groups, n s, in | out]
            input_sum, gradient_sum = input_sum + a.mT @ a, gradient_sum + g.mT @ g
            positions += a.shape[1]
        state["input_factor"].lerp_((input_sum / statistics.count).to(self.dtype), 1 - decay)
        state["gradient_factor"].lerp_((gradient_sum / positions).to(self.dtype), 1 - decay)

    def _chunks(self, samples: LayerSamples) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs [n, groups, s, in], output gradients [n, groups, s, out]; "reduce" leaves one position."""
        for inputs, gradients in samples.chunks():
            if self.weight_sharing == "reduce":
                yield inputs.mean(2, keepdim=True), gradients.sum(2, keepdim=True)
            else:
                yield inputs, gradients

    def refresh(self, state: State, damping: float) -> None:
        """Inverses <- (A + gamma_A I)^(-power), (G + gamma_G I)^(-power)."""
        for side, shift in self._shifts(state, damping).items():
            damped = add_to_diagonal(_wide(state[f"{side}_factor"]), shift.unsqueeze(-1))
            state[f"{side}_inverse"].copy_(inverse_power(damped, self.power))

    def _shifts(self, state: State, damping: float) -> dict[str, Tensor]:
        """gamma_A = pi sqrt(lambda) and gamma_G = sqrt(lambda) / pi, [..., groups] (2015, Section 6.3).

        pi^2 = mean eigenvalue of A / mean eigenvalue of G; relative: lambda = damping times their product,
        the mean eigenvalue of A (x) G. With both, each factor gets sqrt(damping) times its own.
        """
        a = _mean_eigenvalue(_wide(state["input_factor"])).sqrt()
        g = _mean_eigenvalue(_wide(state["gradient_factor"])).sqrt()
        root = damping**0.5 * (a * g if self.relative_damping else torch.ones_like(a))
        pi = a / g if self.pi_correction else torch.ones_like(a)
        return {"input": pi * root, "gradient": root / pi}

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """(G + gamma_G I)^(-power) M (A + gamma_A I)^(-power)."""
        left, right = _wide(state["gradient_inverse"]), _wide(state["input_inverse"])
        product = left @ self._read(direction).to(left.dtype) @ right
        return product.reshape(direction.shape).to(direction.dtype)

    def _read(self, weight: Tensor) -> Tensor:
        """[..., *shape] as [..., groups, out, in]."""
        leading = weight.shape[: weight.ndim - len(self.shape)]
        return weight.reshape(*leading, self.groups, *self.block_shape)


@dataclass(frozen=True)
class CorrectedFactors(KroneckerFactors):
    """EKFAC: F = U diag(S) U^T, U = U_A (x) U_G the eigenvectors of A and G, S measured in their basis.

    S = (1/N) sum_n (U_G^T D_n U_A)^2 by entries: of all diagonals in this basis the one nearest to F (George
    et al. 2018). Direction U_G ((U_G^T M U_A) / (S + lambda)^power) U_A^T.
    """

    reads_caches = True

    def init(self, layer: Layer) -> State:
        """A, G and S [groups, out, in] are averaged, S in the eigenvectors that are cached."""
        outputs, inputs = self.block_shape
        return {
            "input_factor": self._zeros(layer, inputs, inputs),
            "gradient_factor": self._zeros(layer, outputs, outputs),
            "eigenvalues": self._zeros(layer, outputs, inputs),
            "input_basis": self._zeros(layer, inputs, inputs),
            "gradient_basis": self._zeros(layer, outputs, outputs),
        }

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """Averages A, G and S; before there is a basis S stays zero."""
        super().observe(state, statistics, decay)
        assert isinstance(statistics, LayerSamples)
        bases = _wide(state["input_basis"]), _wide(state["gradient_basis"])
        total = torch.zeros(())
        for inputs, gradients in statistics.chunks():
            rotated = inputs @ bases[0].to(inputs.dtype), gradients @ bases[1].to(gradients.dtype)
            total = total + _sum_of_squares(*rotated)
        state["eigenvalues"].lerp_((total / statistics.count).to(self.dtype), 1 - decay)

    def refresh(self, state: State, damping: float) -> None:
        """New eigenvectors; S keeps what it differs by from KFAC's own eigenvalues, carried over to them.

        S <- l_G l_A^T + Q_G^2 (S - k_G k_A^T) (Q_A^2)^T, with the eigenvalues l of the factors, k their
        diagonals in the old basis, Q = new^T old, squares by entries: the diagonal of the same matrix.
        """
        new, old, overlap = {}, {}, {}
        for side in ("input", "gradient"):
            factor, basis = _wide(state[f"{side}_factor"]), _wide(state[f"{side}_basis"])
            new[side], vectors = eigendecomposition(factor)
            old[side] = (basis * (factor @ basis)).sum(-2)
            overlap[side] = (vectors.mT @ basis).square()
            state[f"{side}_basis"].copy_(vectors)
        correction = _wide(state["eigenvalues"]) - _outer(old)
        carried = overlap["gradient"] @ correction @ overlap["input"].mT
        state["eigenvalues"].copy_((_outer(new) + carried).clamp_min(0))

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """U_G ((U_G^T M U_A) / (S + lambda)^power) U_A^T."""
        left, right = _wide(state["gradient_basis"]), _wide(state["input_basis"])
        rotated = left.mT @ self._read(direction).to(left.dtype) @ right
        product = left @ (rotated / self._damped(state, damping).pow(self.power)) @ right.mT
        return product.reshape(direction.shape).to(direction.dtype)

    def _damped(self, state: State, damping: float) -> Tensor:
        """S + lambda; relative: lambda = damping times the mean of S. What rounding hides is no curvature."""
        eigenvalues = _wide(state["eigenvalues"])
        mean = _pooled(eigenvalues.mean((-2, -1)))[..., None, None]
        floor = torch.finfo(mean.dtype).eps * mean
        return (eigenvalues + damping * (mean if self.relative_damping else 1)).clamp_min(floor)


def _sum_of_squares(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Sum_n (sum_s g_ns a_ns^T)^2 by entries: [n, groups, s, in | out] to [groups, out, in]."""
    if inputs.shape[2] == 1:
        return torch.einsum("ngo,ngi->goi", gradients.squeeze(2).square(), inputs.squeeze(2).square())
    size = max(1, _SCRATCH // (inputs.shape[-1] * gradients.shape[-1] * inputs.shape[1]))
    parts = zip(torch.split(inputs, size), torch.split(gradients, size), strict=True)
    return torch.stack([(g.mT @ a).square().sum(0) for a, g in parts]).sum(0)


def _outer(values: dict[str, Tensor]) -> Tensor:
    return values["gradient"].unsqueeze(-1) * values["input"].unsqueeze(-2)


def _mean_eigenvalue(factor: Tensor) -> Tensor:  # [..., groups, b, b] to [..., groups]
    return _pooled(factor.diagonal(dim1=-2, dim2=-1).mean(-1))


def _pooled(means: Tensor) -> Tensor:  # [..., groups]
    """The average of group's mean and layer's: a group without curvature is damped as the layer is."""
    return (0.5 * (means + means.mean(-1, keepdim=True))).clamp_min(NO_CURVATURE)


def _wide(tensor: Tensor) -> Tensor:
    """In a dtype to compute in: half precision only stores."""
    return tensor.to(working_dtype(tensor.dtype))


class KFAC(CurvatureOptimizer):
    """Kronecker-factored Fisher: W <- W - lr (G + gamma_G I)^-1 M (A + gamma_A I)^-1.

    Martens, Grosse 2015, arXiv 1503.05671; convolutions: Grosse, Martens 2016, arXiv 1602.01407. For each
    layer A = E[a a^T] of its inputs [in, in] and G = E[g g^T] of its per-sample output gradients [out, out]
    are averaged; with the bias folded in `in` counts one more. Labels are drawn from the model ("sampled":
    call `observe`), are all labels with their probabilities ("exact": likewise, one backward pass for each
    entry of a sample's output), or those of the data ("empirical"). Linear layers and convolutions with their
    groups; everything else takes the graft's first-order step, or the momentum M where there is none, and so
    does a layer with a factor above `max_dim`: `describe()` says which and why. KFAC needs the nn.Module.

    `weight_sharing` says how positions (tokens, places of an image) count: "expand", as samples, or "reduce",
    together (Eschenhagen et al. 2023, arXiv 2311.00636). `eigenvalue_correction` measures the diagonal in the
    eigenvectors of A and G (EKFAC; George et al. 2018, arXiv 1806.03884), which takes the damping unsplit.

    `lr` is in step lengths of `graft`, so that AdamW's learning rate carries over; with `graft=None` it
    multiplies the raw natural-gradient step. `damping` is lambda, or with `relative_damping` the fraction of
    the layer's mean curvature that lambda is; gamma_A gamma_G = lambda, split by the mean eigenvalues of A
    and G, or equally with `pi_correction=False`. `kl_clip` is kappa: where lr^2 step^T F step, summed over
    layers, exceeds it, all steps shrink alike (Ba et al. 2017). `curvature_decay` is beta of the
    bias-corrected average.

    Memory of a layer is 2 (in^2 + out^2) numbers (EKFAC in out more). A step costs O(in out (in + out)), with
    EKFAC twice; statistics of N samples at S positions O(N S (in^2 + out^2)) beside a backward pass, every
    `statistics_every` steps; inverses O(in^3 + out^3), every `inverse_every`. With groups all are those of
    one group, times their number. The published settings as arguments: docs/methods.md.
    """

    folds = ("linear", "convolution")
    estimators = ("empirical", "sampled", "exact")

    lr: float | Tensor = option(default=3e-3, kw_only=False)
    fisher: Literal["gradient", "empirical", "sampled", "exact"] = option(default="sampled")
    fold_bias: bool = option(default=True)
    pi_correction: bool = option(
        default=True, meaning="Split the damping by the mean eigenvalues of A and G, instead of equally."
    )
    power: float = option(
        default=1.0,
        above=0,
        note="1 for the inverse, 0.5 for the inverse root",
        meaning="Power of the inverse curvature.",
    )
    kl_clip: float | None = option(
        default=None, above=0, per_group=False, meaning="Bound of lr^2 step^T F step, summed over all layers."
    )
    weight_sharing: Literal["expand", "reduce"] = option(
        default="expand", meaning="Whether positions (tokens, places) count as samples, or together."
    )
    eigenvalue_correction: bool = option(
        default=False, meaning="EKFAC: measure the diagonal in the eigenvectors of A and G."
    )
    max_dim: int | None = option(
        default=8192, at_least=1, meaning="A layer with a wider factor takes the first-order step."
    )

    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """Kronecker factors where the samples of a layer can be read, else the first-order step."""
        if not layer.reads_samples:
            return no_curvature(layer.note)
        form = CorrectedFactors if options["eigenvalue_correction"] else KroneckerFactors
        curvature = form(
            shape=layer.shape,
            groups=layer.groups,
            dtype=options["curvature_dtype"] or working_dtype(layer.weight.dtype),
            power=options["power"],
            relative_damping=options["relative_damping"],
            pi_correction=options["pi_correction"],
            weight_sharing=options["weight_sharing"],
        )
        outputs, inputs = curvature.block_shape
        if max(outputs, inputs) > (options["max_dim"] or max(outputs, inputs)):
            return no_curvature(f"a factor of {max(outputs, inputs)} is above max_dim={options['max_dim']}")
        return Plan(
            curvature,
            structure="Kronecker factors"
            + (", eigenvalues corrected" if options["eigenvalue_correction"] else ""),
            reason=f"inputs {inputs}, outputs {outputs}",
            blocks=layer.groups,
            block_size=outputs * inputs,
            statistics_every=options["statistics_every"] or 4,
            inverse_every=options["inverse_every"] or 20,
        )
