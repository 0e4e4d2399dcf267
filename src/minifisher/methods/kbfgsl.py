"""K-BFGS(L): K-BFGS whose output side remembers pairs instead of a matrix.

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
    """H_g from the latest `memory` pairs alone, in compact form: m x out numbers instead of out x out."""

    memory: int = 100

    structure: ClassVar[str] = "Kronecker L-BFGS"

    @property
    def widest(self) -> int:
        """The largest matrix."""
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
            # Scaled to s^T y = 1, which is the same pair and keeps the compact form well conditioned.
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
        """The pairs of gamma^-1 H_g, which start from I, with gamma the initial inverse."""
        root = state["initial_inverse"].sqrt()[..., None, None]
        return state["output_changes"] / root, state["gradient_changes"] * root


class KBFGSL(KroneckerBFGSOptimizer):
    """Kronecker-factored BFGS with limited memory: as KBFGS, with H_g from the latest `pairs` pairs alone.

    Goldfarb, Ren, Bahamou 2020, arXiv 2006.08877: W <- W - lr H_g M H_a, H_g = gamma (I + [S Y] C [S Y]^T)
    with S, Y the m pairs [m, out] and C [2 m, 2 m] (Byrd, Nocedal, Schnabel 1994); gamma = 1, or the inverse
    mean of g^2 with `relative_damping`. Memory is 2 in^2 + 2 m out + 4 m^2 numbers a layer; a step costs O(m
    out in + in^2 out), a pair O(m^2 out + m^3). `max_dim` holds for the inputs only. All else as in KBFGS.
    """

    pairs: int = option(default=100, at_least=1, meaning="The latest pairs that are remembered.")

    def _curvature(self, common: dict[str, Any], options: dict[str, Any]) -> KroneckerBFGS:
        return LimitedMemoryKroneckerBFGS(**common, memory=options["pairs"])
