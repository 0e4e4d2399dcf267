"""What KFAC and K-BFGS share: two matrices for each layer, one over its inputs and one over its outputs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from minifisher.curvature import Curvature, Plan, no_curvature
from minifisher.linalg.damping import curvature_scale
from minifisher.optimizer import CurvatureOptimizer
from minifisher.options import option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from minifisher.statistics.layers import Layer


@dataclass(frozen=True)
class KroneckerCurvature(Curvature):
    """The curvature A (x) G of each group of a layer, with A [in, in] and G [out, out].

    Only a grouped convolution has more than one group. A folded bias is one more input.
    """

    shape: torch.Size  # [groups out, ...], of the layer
    groups: int
    dtype: torch.dtype
    relative_damping: bool = True

    structure: ClassVar[str]

    @property
    def block_shape(self) -> tuple[int, int]:
        """The numbers of outputs and of inputs of one group."""
        return self.shape[0] // self.groups, self.shape[1:].numel()

    @property
    def widest(self) -> int:
        """The width of the largest matrix."""
        return max(self.block_shape)

    def _zeros(self, layer: Layer, *size: int) -> Tensor:
        return layer.weight.new_zeros((self.groups, *size), dtype=self.dtype)

    def _read(self, weight: Tensor) -> Tensor:
        """[..., *shape] as [..., groups, out, in]."""
        leading = weight.shape[: weight.ndim - len(self.shape)]
        return weight.reshape(*leading, self.groups, *self.block_shape)


def scale_of_groups(means: Tensor) -> Tensor:  # [..., groups]
    """`curvature_scale` of every group: the mean of the layer is that of its groups."""
    return curvature_scale(means, means.mean(-1, keepdim=True))


class KroneckerOptimizer(CurvatureOptimizer):
    """A method with Kronecker factors; a layer that has none takes the first-order step."""

    folds: ClassVar[tuple[str, ...]] = ("linear", "convolution")

    fold_bias: bool = option(default=True)
    max_dim: int | None = option(
        default=8192,
        at_least=1,
        meaning="Largest width of a matrix; a layer that needs a wider one takes the first-order step.",
    )

    @abstractmethod
    def _curvature(self, layer: Layer, options: dict[str, Any]) -> KroneckerCurvature: ...

    @abstractmethod
    def _schedule(self, options: dict[str, Any]) -> tuple[int, int]:
        """T1 and T2."""

    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """Kronecker factors, or the first-order step if a layer has no samples or too wide matrices."""
        if not layer.reads_samples:
            return no_curvature(layer.note)
        curvature = self._curvature(layer, options)
        widest, max_dim = curvature.widest, options["max_dim"]
        if max_dim and widest > max_dim:
            return no_curvature(f"a matrix of width {widest} is above max_dim={max_dim}")
        outputs, inputs = curvature.block_shape
        statistics_every, inverse_every = self._schedule(options)
        return Plan(
            curvature,
            structure=curvature.structure,
            reason=f"inputs {inputs}, outputs {outputs}",
            blocks=layer.groups,
            block_size=outputs * inputs,
            statistics_every=statistics_every,
            inverse_every=inverse_every,
        )
