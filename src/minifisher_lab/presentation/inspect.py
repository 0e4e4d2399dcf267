"""Draw the inverse Fisher matrix of a small network with its blocks, and print what the blocks contain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.table import Table

from minifisher_lab.comparison.fisher import shuffled

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from minifisher_lab.comparison.fisher import Layer

LOWEST = 1e-4
"""The smallest entry that is drawn, as a share of the largest."""


def table(layers: Sequence[Layer]) -> Table:
    """For every layer and partition, what share of the norm is inside its blocks and inside random ones."""
    result = Table("layer", "shape", "blocks", box=None, header_style="bold")
    for name in ("number", "size", "% inside", "random", "% inside,\noff-diagonal", "random"):
        result.add_column(name, justify="right")
    for layer in layers:
        shape = "x".join(map(str, layer.shape))
        for name, groups in layer.partitions.items():
            number = int(groups.max()) + 1
            shares = [
                f"{100 * layer.share(some, diagonal=diagonal):.1f}"
                for diagonal in (True, False)
                for some in (groups, shuffled(groups))
            ]
            result.add_row(layer.name, shape, name, str(number), str(len(groups) // number), *shares)
    return result


def draw(layers: Sequence[Layer], title: str, path: Path) -> Path:
    """One row of pictures for every layer: its weights in the order of each partition."""
    columns = max(len(layer.partitions) for layer in layers)
    size = (3.6 * columns, 3.7 * len(layers) + 0.5)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    grid = figure.subplots(len(layers), columns, squeeze=False)
    for layer, row in zip(layers, grid, strict=True):
        for axes in row[len(layer.partitions) :]:
            axes.set_visible(False)
        for axes, name in zip(row, layer.partitions, strict=False):
            _picture(axes, layer, name)
    figure.suptitle(title)
    figure.savefig(path, facecolor="white")
    return path


def _picture(axes: Axes, layer: Layer, partition: str) -> None:
    """|F^-1| with the weights of each block beside each other, and lines around the blocks."""
    groups = layer.partitions[partition]
    order = torch.argsort(groups, stable=True)
    picture = layer.inverse[order][:, order].numpy()
    top = picture.max()
    axes.imshow(picture, cmap="cividis", norm=LogNorm(LOWEST * top, top, clip=True), interpolation="nearest")
    size = len(groups) // (int(groups.max()) + 1)
    for start in range(0, len(groups), size):
        corner = (start - 0.5, start - 0.5)
        axes.add_patch(Rectangle(corner, size, size, fill=False, edgecolor="white", linewidth=0.7))
    axes.set_xticks([])
    axes.set_yticks([])
    shape = "x".join(map(str, layer.shape))
    axes.set_title(
        f"{layer.name} ({shape}), {partition}: {100 * layer.share(groups, diagonal=False):.0f} %", fontsize=9
    )
