"""K-BFGS(L): K-BFGS with limited memory, which stores pairs instead of the matrix of the outputs.

Source: Goldfarb, Ren, Bahamou, "Practical Quasi-Newton Methods for Training Deep Neural Networks",
NeurIPS 2020, arXiv 2006.08877.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from minifisher.linalg.bfgs import limited_memory_middle, limited_memory_product, reciprocal
from minifisher.methods.kbfgs import KroneckerBFGS, KroneckerBFGSOptimizer
from minifisher.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from minifisher.curvature import State
    from minifisher.statistics.layers import Layer


@dataclass(frozen=True)
class LimitedMemoryKroneckerBFGS(KroneckerBFGS):
    """K-BFGS whose H_g is kept as its latest m = `memory` pairs: 2 m out numbers instead of out^2."""

    structure: ClassVar[str] = "Kronecker L-BFGS"

    memory: int = 100

    @property
    def widest(self) -> int:
        """The width of the largest matrix: no matrix has the width of the outputs."""
        return self.block_shape[1]

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
            # Pairs are scaled to s^T y = 1: the update is the same, and the compact form well conditioned.
            later = torch.cat((state[name][..., 1:, :], (fresh * ratio.sqrt()).unsqueeze(-2)), dim=-2)
            state[name].copy_(torch.where(taken.unsqueeze(-1), later, state[name]))
        state["initial_inverse"].copy_(1 / scale)
        state["middle"].copy_(limited_memory_middle(*self._scaled_pairs(state)))
        return taken.squeeze(-1)

    def _times_outputs(self, state: State, matrix: Tensor) -> Tensor:
        pairs = self._scaled_pairs(state)
        return state["initial_inverse"][..., None, None] * limited_memory_product(
            *pairs, state["middle"], matrix
        )

    def _scaled_pairs(self, state: State) -> tuple[Tensor, Tensor]:
        """The pairs of H_g / gamma, which starts from I, where gamma I is the initial H_g."""
        root = state["initial_inverse"].sqrt()[..., None, None]
        return state["output_changes"] / root, state["gradient_changes"] * root


class KBFGSL(KroneckerBFGSOptimizer):
    """Kronecker-factored BFGS with limited memory: W <- W - lr H_g M H_a, H_g made of the latest m pairs.

    H_g = gamma (I + [S Y] C [S Y]^T), with S and Y the m = `pairs` latest pairs [m, out] and C [2 m, 2 m]
    (Byrd, Nocedal, Schnabel 1994). gamma is 1, or with `relative_damping` 1 / mean g^2. Goldfarb, Ren,
    Bahamou 2020, arXiv 2006.08877.

    Everything else is as in KBFGS. The state has 2 in^2 + 2 m out + 4 m^2 numbers; a step costs O(m out in +
    in^2 out), an update of H_g O(m^2 out + m^3).
    """

    pairs: int = option(default=100, at_least=1, meaning="Number m of the latest pairs that H_g is made of.")
    max_dim: int | None = option(
        default=8192,
        meaning="Largest number of inputs; a layer with more takes the first-order step.",
    )

    def _curvature(self, layer: Layer, options: dict[str, Any]) -> KroneckerBFGS:
        return LimitedMemoryKroneckerBFGS(**self._fields(layer, options), memory=options["pairs"])
