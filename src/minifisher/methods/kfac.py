"""KFAC: the Fisher matrix of a layer as the Kronecker product of two small second moments.

Sources: Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML
2015, arXiv 1503.05671; convolutions: Grosse, Martens, ICML 2016, arXiv 1602.01407; weight sharing:
Eschenhagen, Immer, Turner, Schneider, Hennig, NeurIPS 2023, arXiv 2311.00636; eigenvalue correction: George,
Laurent, Bouthillier, Ballas, Vincent, NeurIPS 2018, arXiv 1806.03884.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from minifisher.linalg.damping import above_rounding
from minifisher.linalg.dense import add_to_diagonal, eigendecomposition, inverse_power, working_dtype
from minifisher.methods.choices import curvature_dtype, power_option
from minifisher.methods.kronecker import KroneckerCurvature, KroneckerOptimizer, scale_of_groups
from minifisher.options import option
from minifisher.statistics.records import LayerSamples, Statistics

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer

# Defaults; docs/methods.md has the measurements.
_STATISTICS_EVERY = 4
_INVERSE_EVERY = 20
# Entries of per-sample gradients that are formed at once if positions share a weight: 16 MiB in float32.
_SCRATCH = 2**22


@dataclass(frozen=True)
class KroneckerFactors(KroneckerCurvature):
    """F = A (x) G for each group; direction (G + gamma_G I)^(-power) M (A + gamma_A I)^(-power).

    Sample n has the input a_ns and the output gradient g_ns at each of S shared positions s.
    "expand" treats positions like samples: A = (1/N) sum_ns a_ns a_ns^T, G = (1/NS) sum_ns g_ns g_ns^T.
    "reduce" treats a sample as one: with a_n = mean_s a_ns and g_n = sum_s g_ns,
    A = (1/N) sum_n a_n a_n^T, G = (1/N) sum_n g_n g_n^T (Eschenhagen et al., 2023).
    """

    needs: type[Statistics] = field(default=LayerSamples, init=False)
    averages: ClassVar[tuple[str, ...]] = ("input_factor", "gradient_factor", "eigenvalues")
    recomputed: ClassVar[tuple[str, ...]] = ("input_inverse", "gradient_inverse")
    structure: ClassVar[str] = "Kronecker factors"

    power: float = 1.0
    pi_correction: bool = True
    weight_sharing: str = "expand"

    def init(self, layer: Layer) -> State:
        """The averages A [groups, in, in] and G [groups, out, out], and their damped inverses."""
        outputs, inputs = self.block_shape
        return {
            "input_factor": self._zeros(layer, inputs, inputs),
            "gradient_factor": self._zeros(layer, outputs, outputs),
            "input_inverse": self._zeros(layer, inputs, inputs),
            "gradient_inverse": self._zeros(layer, outputs, outputs),
        }

    def matrices(self, state: State) -> Sequence[Tensor]:
        """A and G."""
        return state["input_factor"], state["gradient_factor"]

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """A <- decay A + (1 - decay) A_new, and G likewise."""
        assert isinstance(statistics, LayerSamples)
        input_sum = gradient_sum = torch.zeros((), device="cpu")  # wherever torch.set_default_device points
        positions = 0
        for a, g in self._chunks(statistics):
            a, g = (part.transpose(0, 1).flatten(1, 2) for part in (a, g))  # [groups, n s, in | out]
            input_sum, gradient_sum = input_sum + a.mT @ a, gradient_sum + g.mT @ g
            positions += a.shape[1]
        state["input_factor"].lerp_((input_sum / statistics.count).to(self.dtype), 1 - decay)
        state["gradient_factor"].lerp_((gradient_sum / positions).to(self.dtype), 1 - decay)

    def _chunks(self, samples: LayerSamples) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs [n, groups, s, in] and output gradients [n, groups, s, out]; with "reduce" s is 1."""
        for inputs, gradients in samples.chunks():
            if self.weight_sharing == "reduce":
                yield inputs.mean(2, keepdim=True), gradients.sum(2, keepdim=True)
            else:
                yield inputs, gradients

    def refresh(self, state: State, damping: float) -> None:
        """Inverses <- (A + gamma_A I)^(-power), (G + gamma_G I)^(-power)."""
        for side, level in self._damping_levels(state, damping).items():
            kept = state[f"{side}_factor"]
            factor = _widened(kept)
            damped = add_to_diagonal(factor, above_rounding(level, factor, kept.dtype).unsqueeze(-1))
            state[f"{side}_inverse"].copy_(inverse_power(damped, self.power))

    def _damping_levels(self, state: State, damping: float) -> dict[str, Tensor]:
        """gamma_A = pi sqrt(lambda) and gamma_G = sqrt(lambda) / pi, [..., groups] (2015, Section 6.3).

        pi^2 is the mean eigenvalue of A divided by that of G; without `pi_correction` it is 1. Relative:
        lambda is `damping` times the product of the two, which is the mean eigenvalue of A (x) G.
        """
        a = _mean_eigenvalue(_widened(state["input_factor"])).sqrt()
        g = _mean_eigenvalue(_widened(state["gradient_factor"])).sqrt()
        root = damping**0.5 * (a * g if self.relative_damping else torch.ones_like(a))
        pi = a / g if self.pi_correction else torch.ones_like(a)
        return {"input": pi * root, "gradient": root / pi}

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """(G + gamma_G I)^(-power) M (A + gamma_A I)^(-power)."""
        left, right = _widened(state["gradient_inverse"]), _widened(state["input_inverse"])
        product = left @ self._read(direction).to(left.dtype) @ right
        return product.reshape(direction.shape).to(direction.dtype)


@dataclass(frozen=True)
class CorrectedFactors(KroneckerFactors):
    """EKFAC: F = U diag(S) U^T, where U = U_A (x) U_G are the eigenvectors of A (x) G.

    S = (1/N) sum_n (U_G^T D_n U_A)^2, squared entry by entry, is measured. With this basis, no other
    diagonal is nearer to the Fisher matrix (George et al., 2018). The direction is
    U_G ((U_G^T M U_A) / (S + lambda)^power) U_A^T; lambda is not split.
    """

    reads_caches = True
    recomputed: ClassVar[tuple[str, ...]] = ("input_basis", "gradient_basis")
    structure: ClassVar[str] = "Kronecker factors, eigenvalues corrected"

    def init(self, layer: Layer) -> State:
        """The averages A, G and S [groups, out, in], and the eigenvectors of A and G."""
        outputs, inputs = self.block_shape
        return {
            "input_factor": self._zeros(layer, inputs, inputs),
            "gradient_factor": self._zeros(layer, outputs, outputs),
            "eigenvalues": self._zeros(layer, outputs, inputs),
            "input_basis": self._zeros(layer, inputs, inputs),
            "gradient_basis": self._zeros(layer, outputs, outputs),
        }

    def observe(self, state: State, statistics: Statistics, decay: float) -> None:
        """Average A, G and S; S stays zero until the first refresh has made a basis."""
        super().observe(state, statistics, decay)
        assert isinstance(statistics, LayerSamples)
        bases = _widened(state["input_basis"]), _widened(state["gradient_basis"])
        total = torch.zeros((), device="cpu")  # likewise
        for inputs, gradients in statistics.chunks():
            rotated = inputs @ bases[0].to(inputs.dtype), gradients @ bases[1].to(gradients.dtype)
            total = total + _sum_of_squares(*rotated)
        state["eigenvalues"].lerp_((total / statistics.count).to(self.dtype), 1 - decay)

    def refresh(self, state: State, damping: float) -> None:
        """Compute the eigenvectors of A and G anew, and express S in them.

        S <- l_G l_A^T + Q_G^2 (S - k_G k_A^T) (Q_A^2)^T. Here l are the eigenvalues of a factor, k is the
        diagonal of the factor in the old basis, and Q = new^T old is squared entry by entry. The part of S
        that KFAC does not explain, S - k_G k_A^T, is thus carried over; KFAC's own part is replaced.
        """
        new, old, overlap = {}, {}, {}
        for side in ("input", "gradient"):
            factor, basis = _widened(state[f"{side}_factor"]), _widened(state[f"{side}_basis"])
            new[side], vectors = eigendecomposition(factor)
            old[side] = (basis * (factor @ basis)).sum(-2)
            overlap[side] = (vectors.mT @ basis).square()
            state[f"{side}_basis"].copy_(vectors)
        correction = _widened(state["eigenvalues"]) - _outer(old)
        carried = overlap["gradient"] @ correction @ overlap["input"].mT
        state["eigenvalues"].copy_((_outer(new) + carried).clamp_min(0))

    def precondition(self, state: State, direction: Tensor, damping: float) -> Tensor:
        """U_G ((U_G^T M U_A) / (S + lambda)^power) U_A^T."""
        left, right = _widened(state["gradient_basis"]), _widened(state["input_basis"])
        rotated = left.mT @ self._read(direction).to(left.dtype) @ right
        product = left @ (rotated / self._damped_eigenvalues(state, damping).pow(self.power)) @ right.mT
        return product.reshape(direction.shape).to(direction.dtype)

    def _damped_eigenvalues(self, state: State, damping: float) -> Tensor:
        """S + lambda, [..., groups, out, in]; relative: lambda is `damping` times the mean of S.

        At least the machine epsilon times the mean of S: smaller values are rounding errors.
        """
        eigenvalues = _widened(state["eigenvalues"])
        mean = scale_of_groups(eigenvalues.mean((-2, -1)))[..., None, None]
        floor = torch.finfo(mean.dtype).eps * mean
        return (eigenvalues + damping * (mean if self.relative_damping else 1)).clamp_min(floor)


def _sum_of_squares(inputs: Tensor, gradients: Tensor) -> Tensor:
    """sum_n (sum_s g_ns a_ns^T)^2, squared entry by entry: [n, groups, s, in | out] to [groups, out, in]."""
    if inputs.shape[2] == 1:
        return torch.einsum("ngo,ngi->goi", gradients.squeeze(2).square(), inputs.squeeze(2).square())
    size = max(1, _SCRATCH // (inputs.shape[-1] * gradients.shape[-1] * inputs.shape[1]))
    parts = zip(torch.split(inputs, size), torch.split(gradients, size), strict=True)
    return torch.stack([(g.mT @ a).square().sum(0) for a, g in parts]).sum(0)


def _outer(values: dict[str, Tensor]) -> Tensor:
    return values["gradient"].unsqueeze(-1) * values["input"].unsqueeze(-2)


def _mean_eigenvalue(factor: Tensor) -> Tensor:  # [..., groups, b, b] to [..., groups]
    return scale_of_groups(factor.diagonal(dim1=-2, dim2=-1).mean(-1))


def _widened(tensor: Tensor) -> Tensor:
    """In the dtype to compute in: what is stored in half precision is computed in float32."""
    return tensor.to(working_dtype(tensor.dtype))


class KFAC(KroneckerOptimizer):
    """Kronecker-factored Fisher: W <- W - lr (G + gamma_G I)^-1 M (A + gamma_A I)^-1.

    A = E[a a^T], [in, in], of the inputs of a layer, G = E[g g^T], [out, out], of its per-sample output
    gradients; gamma_A gamma_G = lambda, see `pi_correction`. Labels are drawn from the model
    (`fisher="sampled"`), are those of the data ("empirical"), or are all labels with their probabilities
    ("exact": one backward pass for each output entry of a sample). "sampled" and "exact" need a call of
    `observe`. Martens, Grosse 2015, arXiv 1503.05671; convolutions: Grosse, Martens 2016, arXiv 1602.01407;
    the published settings as arguments: docs/methods.md.

    Linear layers and convolutions, also grouped ones, have factors. Every other weight takes the first-order
    step of `graft`, or the momentum M with `graft=None`; `describe()` shows which and why.

    `lr` is in step lengths of `graft`: the learning rate of AdamW carries over. With `graft=None` it
    multiplies the natural-gradient step itself.

    For W [out, in], N samples and S positions: the state has 2 (in^2 + out^2) numbers, with EKFAC out in
    more; a step costs O(out in (in + out)), with EKFAC twice as much; an observation O(N S (in^2 + out^2))
    and, with drawn labels, a backward pass; a refresh O(in^3 + out^3). For a grouped convolution these are
    the costs of one group. Raises ValueError for parameters without their nn.Module.
    """

    estimators: ClassVar[tuple[str, ...]] = ("empirical", "sampled", "exact")

    lr: float | Tensor = option(default=3e-3, kw_only=False)
    fisher: Literal["gradient", "empirical", "sampled", "exact"] = option(default="sampled")
    power: float = power_option(1.0)
    pi_correction: bool = option(
        default=True,
        meaning="Split the damping in proportion to the mean eigenvalues of A and G, instead of equally.",
    )
    weight_sharing: Literal["expand", "reduce"] = option(
        default="expand",
        meaning='"expand": the positions of a sample (tokens, places of an image) count like samples; '
        '"reduce": a sample counts once, with the mean of its inputs and the sum of its output gradients.',
    )
    eigenvalue_correction: bool = option(
        default=False,
        meaning="EKFAC (arXiv 1806.03884): measure the diagonal of the Fisher matrix in the eigenvectors of "
        "A and G; the damping is then not split.",
    )
    kl_clip: float | None = option(
        default=None,
        above=0,
        per_group=False,
        meaning="Largest lr^2 step^T P^-1 step, with the damped curvature P^-1, summed over all layers; "
        "beyond it all steps shrink by one factor (Ba et al., 2017).",
    )

    def _schedule(self, options: dict[str, Any]) -> tuple[int, int]:
        return options["statistics_every"] or _STATISTICS_EVERY, options["inverse_every"] or _INVERSE_EVERY

    def _curvature(self, layer: Layer, options: dict[str, Any]) -> KroneckerFactors:
        form = CorrectedFactors if options["eigenvalue_correction"] else KroneckerFactors
        return form(
            shape=layer.shape,
            groups=layer.groups,
            dtype=curvature_dtype(layer, options),
            relative_damping=options["relative_damping"],
            power=options["power"],
            pi_correction=options["pi_correction"],
            weight_sharing=options["weight_sharing"],
        )
