"""Random changes of training images: crop, flip and colour."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from minifisher_lab.problems.problem import Augmentation
    from minifisher_lab.training.samples import Samples

GREY = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in the luminance (ITU-R BT.601)."""
BRIGHTNESS, CONTRAST, SATURATION = (1 - 63 / 255, 1 + 63 / 255), (0.2, 1.8), (0.5, 1.5)
"""The ranges of MBF's authors for SVHN (Bahamou, Goldfarb, Ren 2023, published code)."""


def augmented(inputs: Tensor, kind: Augmentation, samples: Samples, generator: Generator) -> Tensor:
    """Images [N, C, H, W] of `samples`, changed at random.

    "crop": padded by 4 pixels and cropped; "crop and flip": half of them mirrored, too; "crop and colour":
    padded by 2 pixels and cropped, then brightness, saturation and contrast are changed.
    """
    if kind == "none":
        return inputs
    if kind != "crop and colour":
        return crop(inputs, generator, flip=kind == "crop and flip")
    plain = crop(inputs * samples.deviation + samples.mean, generator, flip=False, border=2)
    return (recoloured(plain, generator) - samples.mean) / samples.deviation


def crop(images: Tensor, generator: Generator, *, flip: bool, border: int = 4) -> Tensor:
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


def recoloured(images: Tensor, generator: Generator) -> Tensor:
    """Images [N, 3, H, W] in [0, 1]: f x, then f x + (1 - f) grey(x), then f x + (1 - f) mean(grey(x)).

    The three factors f are uniform in their ranges, one of each an image. Every result is cut to [0, 1].
    """
    images = (images * _factors(images, BRIGHTNESS, generator)).clamp(0, 1)
    images = torch.lerp(_grey(images), images, _factors(images, SATURATION, generator)).clamp(0, 1)
    mean = _grey(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, _factors(images, CONTRAST, generator)).clamp(0, 1)


def _factors(images: Tensor, ends: tuple[float, float], generator: Generator) -> Tensor:
    low, high = ends
    return (low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator)).to(images.device)


def _grey(images: Tensor) -> Tensor:
    """The luminance, [N, 1, H, W]."""
    return (images * images.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)
