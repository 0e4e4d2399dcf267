"""Data in memory as tensors: batches in a seeded order, and augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from minifisher_lab import data
from minifisher_lab.problems import own
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
        inputs = self.samples.inputs[chosen]
        if self.augmentation != "none":
            inputs = crop(inputs, self.generator, flip=self.augmentation == "crop and flip")
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


def crop(images: Tensor, generator: torch.Generator, *, flip: bool, border: int = 4) -> Tensor:
    """Pad each image [N, C, H, W] with zeros and crop it at random; `flip` mirrors half of the images."""
    count, _, height, width = images.shape
    top, left = torch.randint(0, 2 * border + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = functional.pad(images, (border,) * 4).permute(0, 2, 3, 1)
    which = torch.arange(count)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
