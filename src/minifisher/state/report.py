"""What an optimizer chose for every weight, and what share of the parameters each structure covers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minifisher.statistics.records import BatchGradient

if TYPE_CHECKING:
    from minifisher.curvature import Plan
    from minifisher.statistics.layers import Layer


@dataclass(frozen=True)
class LayerDescription:
    """One weight: its structure, why, how often it is updated, and what its curvature takes."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    structure: str
    reason: str
    blocks: int
    block_size: int
    state_bytes: int
    statistics_every: int
    inverse_every: int


@dataclass(frozen=True)
class Description:
    """Every weight of an optimizer; prints as a table."""

    method: str
    layers: tuple[LayerDescription, ...]

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of curvature state."""
        return sum(layer.state_bytes for layer in self.layers)

    @property
    def coverage(self) -> dict[str, float]:
        """Structure -> the share of all parameters that it covers, the largest first."""
        covered: dict[str, int] = defaultdict(int)
        for layer in self.layers:
            covered[layer.structure] += layer.parameters
        return {name: covered[name] / self.parameters for name in sorted(covered, key=lambda n: -covered[n])}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("weight", "shape", "structure", "blocks", "size", "bytes", "T1", "T2", "why")
        ]
        rows += [_row(layer) for layer in self.layers]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.coverage.items())
        per_parameter = self.state_bytes / self.parameters
        size = f"{self.parameters:,} parameters, {per_parameter:.1f} curvature bytes each"
        return "\n".join([*table, f"{self.method}: {size}; {shares}"])


def describe_layer(layer: Layer, plan: Plan, fisher: str) -> LayerDescription:
    """What `plan` means for one layer of which the user wants `fisher`; nothing is allocated to find out."""
    fell_back = fisher != "gradient" and plan.curvature.needs is BatchGradient
    state = plan.curvature.init(replace(layer, weight=layer.weight.detach().to("meta")))
    return LayerDescription(
        name=layer.name,
        shape=tuple(layer.shape),
        parameters=layer.shape.numel(),
        structure=plan.structure,
        reason=f"{plan.reason}; {layer.note}" if fell_back else plan.reason,
        blocks=plan.blocks,
        block_size=plan.block_size,
        state_bytes=sum(tensor.nbytes for tensor in state.values()),
        statistics_every=plan.statistics_every,
        inverse_every=plan.inverse_every,
    )


def _row(layer: LayerDescription) -> tuple[str, ...]:
    return (
        layer.name,
        "x".join(map(str, layer.shape)) or "scalar",
        layer.structure,
        f"{layer.blocks:,}",
        str(layer.block_size),
        f"{layer.state_bytes:,}",
        str(layer.statistics_every),
        str(layer.inverse_every),
        layer.reason,
    )
