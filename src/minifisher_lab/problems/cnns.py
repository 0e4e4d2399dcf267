"""Convolutional classifiers of 28x28 and 32x32 images: five layers, ResNet-32, VGG-11 and VGG-16."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from torch import nn
from torch.nn import functional

from minifisher_lab.problems.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from minifisher_lab.problems.problem import Augmentation, Initialisation

VGG_WIDTHS: dict[int, tuple[int | Literal["pool"], ...]] = {
    11: (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"),
    16: (
        64,
        64,
        "pool",
        128,
        128,
        "pool",
        256,
        256,
        256,
        "pool",
        512,
        512,
        512,
        "pool",
        512,
        512,
        512,
        "pool",
    ),
}


def convolutions(
    channels: int, widths: Sequence[int | Literal["pool"]], *, norm: bool = True
) -> list[nn.Module]:
    """3x3 convolutions with bias, batch norm (if `norm`) and ReLU, one per width; "pool" halves the image."""
    layers: list[nn.Module] = []
    for width in widths:
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            norms = [nn.BatchNorm2d(width)] if norm else []
            layers += [nn.Conv2d(channels, width, 3, padding=1), *norms, nn.ReLU()]
            channels = width
    return layers


def five_layer(channels: int, width: int, classes: int) -> nn.Sequential:
    """Five 3x3 convolutions with batch norm, `width` to 4 `width` channels, global mean, one linear layer."""
    body = convolutions(channels, (width, width, "pool", 2 * width, 2 * width, "pool", 4 * width))
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def vgg(
    depth: int,
    channels: int,
    classes: int,
    *,
    image: int = 32,
    hidden: Sequence[int] = (),
    norm: bool = True,
) -> nn.Sequential:
    """VGG (Simonyan, Zisserman 2015); no dropout, because K-BFGS evaluates a batch twice.

    28x28 images are padded to 32x32, so that five halvings leave one position.
    """
    padding: list[nn.Module] = [] if image == 32 else [nn.ZeroPad2d((32 - image) // 2)]
    head: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise((512, *hidden, classes)):
        head += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*padding, *convolutions(channels, VGG_WIDTHS[depth], norm=norm), *head[:-1])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut: strided, new channels are zero (He et al. 2016, 4.2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.new_channels = outputs - inputs
        self.convolution1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.convolution2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, images: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        hidden = functional.relu(self.norm1(self.convolution1(images)))
        shortcut = images[:, :, :: self.stride, :: self.stride]
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, self.new_channels // 2, self.new_channels // 2))
        return functional.relu(self.norm2(self.convolution2(hidden)) + shortcut)


def resnet(depth: int, channels: int, classes: int) -> nn.Sequential:
    """ResNet-(6n + 2) for small images (He et al. 2016, section 4.2): 16, 32, 64 channels, n blocks each."""
    widths = [16] + [width for width in (16, 32, 64) for _ in range((depth - 2) // 6)]
    stem = [nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [ResidualBlock(inputs, outputs) for inputs, outputs in pairwise(widths)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def _small(data: str, architecture: Callable[[], nn.Module], batch_size: int, epochs: int) -> Problem:
    return Problem(
        name=f"cnn-{data.removesuffix('-mnist')}",
        description="five 3x3 convolutions, batch norm",
        data=data,
        architecture=architecture,
        likelihood="categorical",
        batch_size=batch_size,
        epochs=epochs,
        schedule="linear",
    )


def _large(
    network: str,
    description: str,
    data: str,
    architecture: Callable[[], nn.Module],
    augmentation: Augmentation,
    initialisation: Initialisation = "torch",
) -> Problem:
    return Problem(
        name=f"{network}-{data}",
        description=description,
        data=data,
        architecture=architecture,
        likelihood="categorical",
        batch_size=128,
        epochs=100,
        schedule="steps",
        augmentation=augmentation,
        initialisation=initialisation,
    )


_RESNET32 = "16/32/64 channels x 5 blocks"
_VGG11 = "batch norm, one linear layer"
_VGG16 = "batch norm, head 512-4096-4096"
_PLAIN = "no batch norm, head 512-4096-4096-10"
_WIDE = (4096, 4096)
_VGG11_PLAIN = partial(vgg, 11, 3, 10, hidden=_WIDE, norm=False)

# Networks, batch 128, crop 4 and flip: Ren, Goldfarb 2021 (arXiv 2106.02925), published code.
SMALL = (
    _small("digits", partial(five_layer, 1, 8, 10), batch_size=64, epochs=10),
    _small("mnist", partial(five_layer, 1, 32, 10), batch_size=128, epochs=3),
    _small("fashion-mnist", partial(five_layer, 1, 32, 10), batch_size=128, epochs=3),
    _small("cifar10", partial(five_layer, 3, 32, 10), batch_size=128, epochs=10),
)
LARGE = (
    _large("resnet32", _RESNET32, "fashion-mnist", partial(resnet, 32, 1, 10), "crop and flip"),
    _large("resnet32", _RESNET32, "cifar10", partial(resnet, 32, 3, 10), "crop and flip"),
    _large("resnet32", _RESNET32, "cifar100", partial(resnet, 32, 3, 100), "crop and flip"),
    _large("vgg11", _VGG11, "fashion-mnist", partial(vgg, 11, 1, 10, image=28), "crop and flip"),
    _large("vgg11", _VGG11, "cifar10", partial(vgg, 11, 3, 10), "crop and flip"),
    _large("vgg16", _VGG16, "cifar10", partial(vgg, 16, 3, 10, hidden=_WIDE), "crop and flip"),
    _large("vgg16", _VGG16, "cifar100", partial(vgg, 16, 3, 100, hidden=_WIDE), "crop and flip"),
    # SVHN is cropped but not flipped, because a mirrored house number is a different number.
    _large("vgg16", _VGG16, "svhn", partial(vgg, 16, 3, 10, hidden=_WIDE), "crop"),
    # Network, start and colours: Bahamou, Goldfarb, Ren 2023 (arXiv 2202.04124), published code. Where SVHN's
    # files cannot be had, CIFAR-10 takes their place, under its own name.
    _large("vgg11-plain", _PLAIN, "svhn", _VGG11_PLAIN, "crop and colour", "fan-out"),
    _large("vgg11-plain", _PLAIN, "cifar10", _VGG11_PLAIN, "crop and flip", "fan-out"),
)
