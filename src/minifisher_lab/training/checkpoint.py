"""The checkpoint of a run: one file with everything that the rest of the run depends on."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from minifisher_lab.training import processes
from minifisher_lab.training.runs import Unresumable

if TYPE_CHECKING:
    from minifisher_lab.training.runs import Run, RunFolder

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """Where the checkpoint of a run is stored, and how often it is written."""

    folder: RunFolder
    run: Run
    every: int | None = None
    """The number of steps between two checkpoints; None: one at every logged point."""

    @property
    def name(self) -> str:
        """The name of the file."""
        return f"{self.run.name}.pt"

    def due(self, *, logged: bool, ended: bool) -> bool:
        """Whether it is time for one: also at the end, so that the final weights are kept."""
        return ended or (logged if self.every is None else self.run.steps % self.every == 0)

    def save(self, state: dict[str, Any]) -> None:
        """Write the states of all torchrun processes into one file."""
        states = processes.gathered(state)
        if processes.rank() == 0:
            content = io.BytesIO()
            torch.save({"format": FORMAT, "processes": states}, content)
            self.folder.save(self.name, content.getbuffer())

    def load(self) -> dict[str, Any] | None:
        """This process's state in the file of a resumed folder; None if there is none."""
        exists = (self.folder.path / self.name).exists
        if not self.folder.resumed or not processes.read_by_first(exists):
            return None
        with self.folder.readable(self.name) as content:
            saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if saved["format"] != FORMAT:
                raise ValueError(f"its format is {saved['format']}, not {FORMAT}")
            states: list[dict[str, Any]] = saved["processes"]
        if len(states) != processes.world_size():
            raise Unresumable(
                f"{self.folder.path / self.name} was written by {len(states)} processes, not by "
                f"{processes.world_size()}: start as many"
            )
        return states[processes.rank()]

    def remove(self) -> None:
        """Delete the file."""
        self.folder.remove(self.name)
