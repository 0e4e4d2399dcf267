"""What an optimizer reports: its choice for every weight, and counts of what went wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minifisher.callers import warn_caller
from minifisher.distributed.placement import meta_state
from minifisher.statistics.records import BatchGradient

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from minifisher.curvature import Plan
    from minifisher.statistics.layers import Layer
    from minifisher.step.layer_stack import Enrolled


@dataclass(frozen=True)
class LayerDescription:
    """One weight: its structure and the reason, how often it is updated, and the bytes of its curvature."""

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
    trains: bool = True
    """False for a frozen weight, which does not count in shares and sums."""


@dataclass(frozen=True)
class Description:
    """Every weight of an optimizer; prints as a table."""

    method: str
    layers: tuple[LayerDescription, ...]
    kernels: tuple[str, ...] = ()
    """Of every kind of device: whether compiled kernels are used, or what they would bring."""
    waiting: tuple[str, ...] = ()
    """Parameters of lazy modules: they have no shape so far, and are planned when they have one."""

    @property
    def parameters(self) -> int:
        """All parameters that are trained."""
        return sum(layer.parameters for layer in self._trained)

    @property
    def frozen(self) -> int:
        """All parameters that are not trained, because `requires_grad` is False."""
        return sum(layer.parameters for layer in self.layers) - self.parameters

    @property
    def state_bytes(self) -> int:
        """Bytes of curvature state; a frozen weight gets none."""
        return sum(layer.state_bytes for layer in self._trained)

    @property
    def coverage(self) -> dict[str, float]:
        """Structure -> the share of the trained parameters that it covers, the largest first."""
        covered: dict[str, int] = defaultdict(int)
        for layer in self._trained:
            covered[layer.structure] += layer.parameters
        return {name: covered[name] / self._total for name in sorted(covered, key=lambda n: -covered[n])}

    @property
    def _trained(self) -> list[LayerDescription]:
        return [layer for layer in self.layers if layer.trains]

    @property
    def _total(self) -> int:
        """What shares are taken of; not zero where every weight is empty."""
        return max(1, self.parameters)

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
        per_parameter = self.state_bytes / self._total
        size = f"{self.parameters:,} parameters, {per_parameter:.1f} curvature bytes each"
        frozen = f"; {self.frozen:,} frozen parameters are not counted" if self.frozen else ""
        summary = f"{self.method}: {size}; {shares}{frozen}"
        return "\n".join([*table, *map(_waiting_row, self.waiting), summary, *self.kernels])


def describe_layer(layer: Layer, plan: Plan, fisher: str) -> LayerDescription:
    """One row of the description; no memory is allocated for it."""
    fell_back = fisher != "gradient" and plan.curvature.needs is BatchGradient
    state = meta_state(plan.curvature, layer)
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
        trains=any(parameter.requires_grad for parameter in layer.parameters),
    )


def _waiting_row(name: str) -> str:
    return f"{name}  of a lazy module, which has no shape before its first forward pass: planned then"


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


# ---- counts ----


@dataclass(eq=False)
class Counters:
    """Counts of what went wrong; each kind is warned of once. With `capturable` counts are tensors []."""

    skipped: Any = 0
    """Steps that were not taken because a gradient was not finite."""
    fallbacks: Any = 0
    """Layers that took the first-order step because their direction was not finite."""
    frozen: int = 0
    """Layers that stayed: their first-order step was not finite either, or led beyond float16."""
    renewed: int = 0
    """Layers whose curvature began anew because its averages were not finite."""

    def skip(self) -> None:
        """Count a step that was not taken."""
        self.skipped += 1
        if self.skipped == 1:
            warn_caller(
                "a gradient was NaN or infinite, or so large that the square of its norm is: the step was "
                "skipped, weights and curvature are as before; optimizer.skipped_steps counts on, this "
                "warning is not repeated"
            )

    def add(self, fallbacks: int, frozen: int, renewed: int = 0) -> None:
        """Count the layers of one step."""
        if renewed and not self.renewed:
            warn_caller(
                "the averages of a layer's curvature overflowed: they begin anew; look for huge data. "
                'optimizer.diagnostics()["renewed_curvatures"] counts on, this warning is not repeated'
            )
        elif fallbacks and not self.fallbacks:
            warn_caller(
                "the direction of a layer was not finite: it took the first-order step; raise the damping. "
                'optimizer.diagnostics()["fallbacks"] counts on, this warning is not repeated'
            )
        if frozen and not self.frozen:
            warn_caller(
                "the step of a layer was not finite, also the first-order step, or led beyond the range of "
                "float16: its weights stay; look for weights, an lr or a weight_decay out of range. "
                'optimizer.diagnostics()["frozen_layers"] counts on, this warning is not repeated'
            )
        self.fallbacks += fallbacks
        self.frozen += frozen
        self.renewed += renewed

    def move_to(self, device: torch.device) -> None:
        """Count on a device, without asking the host."""
        self.skipped, self.fallbacks = (
            torch.tensor(int(count), device=device) for count in (self.skipped, self.fallbacks)
        )

    def report(self) -> dict[str, int]:
        """All counts."""
        return {
            "skipped_steps": int(self.skipped),
            "fallbacks": int(self.fallbacks),
            "frozen_layers": self.frozen,
            "renewed_curvatures": self.renewed,
        }


def counts(entry: dict[str, Any]) -> dict[str, float]:
    """Steps, observations, and every single number that the curvature keeps."""
    counts: dict[str, float] = {"step": 0, "observations": 0}
    for name, value in entry.items():
        if name in counts or (isinstance(value, Tensor) and value.dtype == torch.int64):
            counts[name] = int(value)
        elif isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point():
            counts[name] = float(value)
    return counts


def layers_by_name(
    members: Iterable[Enrolled], groups: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, Layer]]:
    """Every layer with its name, and with its group where two modules have layers of one name."""
    members = list(members)
    times = Counter(member.layer.name for member in members)
    indices = {id(group): index for index, group in enumerate(groups)}
    for member in members:
        place = f" of group {indices[id(member.group)]}" if times[member.layer.name] > 1 else ""
        yield member.layer.name + place, member.layer
