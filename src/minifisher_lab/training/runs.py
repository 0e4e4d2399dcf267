"""The record of a run: its logged points, its totals, and the folder that stores them as JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from minifisher_lab.training import processes

if TYPE_CHECKING:
    from pathlib import Path

Status = Literal["running", "finished", "diverged", "interrupted"]


@dataclass(frozen=True)
class Point:
    """One logged point. `seconds` counts training only, not evaluation."""

    step: int
    epoch: float
    seconds: float
    batch_loss: float
    """The mean of the mini-batch losses since the last point."""
    train_loss: float
    """The loss on the fixed slice of the training set. Runs are compared by it."""
    test_loss: float
    test_accuracy: float | None

    @property
    def finite(self) -> bool:
        """Whether both training losses are finite, so that the run can go on."""
        return math.isfinite(self.batch_loss) and math.isfinite(self.train_loss)


@dataclass
class Run:
    """One optimizer with one learning rate and one seed, and what was measured so far."""

    problem: str
    optimizer: str
    rate: float
    seed: int
    status: Status = "running"
    steps: int = 0
    seconds: float = 0.0
    parameters: int = 0
    state_bytes: int = 0
    skipped_steps: int = 0
    test_loss: float | None = None
    test_accuracy: float | None = None
    points: list[Point] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name, usable as a file name."""
        return re.sub(r"[^\w.=+-]+", "-", f"{self.optimizer}-lr{self.rate:g}-seed{self.seed}")

    @property
    def best_loss(self) -> float:
        """The lowest loss on the fixed slice of the training set."""
        return min((point.train_loss for point in self.points if point.finite), default=math.inf)

    def seconds_to(self, loss: float) -> float | None:
        """The training seconds at the first point whose training loss is at or below `loss`."""
        return next((point.seconds for point in self.points if point.train_loss <= loss), None)


def without_infinities(value: Any) -> Any:
    """The same value with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_infinities(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_infinities(entry) for entry in value]
    return value


@dataclass(frozen=True)
class RunFolder:
    """A folder for the results and for one file per run, with one JSON line per point."""

    path: Path

    @classmethod
    def create(cls, parent: Path, label: str) -> RunFolder:
        """Create a new folder named by the time and the label; it never replaces an older one.

        Under torchrun only the first process creates the folder and writes into it.
        """
        stamp = f"{datetime.now():%Y%m%d-%H%M%S}-{label}"
        names = (stamp, *(f"{stamp}-{number}" for number in range(2, 1000)))
        path = next(parent / name for name in names if not (parent / name).exists())
        if processes.rank() > 0:
            return Nowhere(path)
        path.mkdir(parents=True)
        return cls(path)

    def log(self, run: Run, point: Point) -> None:
        """Append the point to the run's file."""
        with (self.path / f"{run.name}.jsonl").open("a") as lines:
            lines.write(json.dumps(without_infinities(asdict(point))) + "\n")

    def write(self, name: str, content: dict[str, Any]) -> Path:
        """Write a JSON file into the folder."""
        path = self.path / name
        path.write_text(json.dumps(without_infinities(content), indent=1) + "\n")
        return path


class Nowhere(RunFolder):
    """A run folder that writes nothing: for all torchrun processes but the first."""

    def log(self, run: Run, point: Point) -> None:
        """Do nothing."""

    def write(self, name: str, content: dict[str, Any]) -> Path:
        """Write nothing."""
        return self.path / name
