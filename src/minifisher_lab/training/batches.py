"""Data in memory as tensors, and its batches in a seeded order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from minifisher_lab import data
from minifisher_lab.problems import own
from minifisher_lab.training.augmentation import augmented
from minifisher_lab.training.samples import LOADERS
from minifisher_lab.training.samples import Samples as Samples
from minifisher_lab.training.samples import Splits as Splits

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from minifisher_lab.problems import Problem
    from minifisher_lab.problems.problem import Augmentation


def load(problem: Problem, device: torch.device) -> Splits:
    """The problem's data on the device; `samples.py` says how each kind of data is prepared."""
    if not isinstance(problem.data, str):
        parts = own.tensors(problem)
        return Splits(Samples(*parts[:2]), Samples(*parts[2:])).to(device)
    return LOADERS[data.kind_of(problem.data)](problem).to(device)


class Batches:
    """An endless stream of full batches; each epoch takes the samples in a new order drawn from the seed."""

    def __init__(self, samples: Samples, size: int, seed: int, augmentation: Augmentation) -> None:
        self.samples, self.size, self.augmentation = samples, size, augmentation
        self.generator = torch.Generator().manual_seed(seed)
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.at_start = self.generator.get_state()
        self.order = torch.randperm(len(self.samples), generator=self.generator)
        self.order = self.order.to(self.samples.inputs.device)
        self.position = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if self.position == len(self.samples) // self.size:
            self._begin_epoch()
        chosen = self.order[self.position * self.size :][: self.size]
        self.position += 1
        inputs = augmented(self.samples.inputs[chosen], self.augmentation, self.samples, self.generator)
        return inputs, self.samples.targets[chosen]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: the generator at the start of the epoch and now, and the batches taken."""
        return {
            "at_start": self.at_start,
            "generator": self.generator.get_state(),
            "position": self.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the stream with this state stood."""
        self.generator.set_state(state["at_start"])
        self._begin_epoch()
        self.generator.set_state(state["generator"])
        self.position = state["position"]


def batches(samples: Samples, size: int, seed: int, augmentation: Augmentation) -> Batches:
    """The stream of a run with this seed."""
    return Batches(samples, size, seed, augmentation)
