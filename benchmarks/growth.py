"""How the time and the state of a step grow: with the weights, the layers and the samples of a batch.

The network has equal square layers with residual connections. A whole step of a method and one of AdamW
(foreach) take turns; a ratio is the median over turns of eight steps, which every period divides.

    python benchmarks/growth.py --plot docs/images/growth.svg > benchmarks/results/growth.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from alternate import alternate, compare, report
from matplotlib.figure import Figure
from step_time import repeat
from torch import Tensor, nn
from torch.nn import functional

import minifisher
from minifisher.statistics.layers import layers_of
from minifisher_lab.training.optimizers import choose

RATE = 1e-6  # so small that all networks stay at the start, where they cost the same
METHODS = ("mbf", "kfac", "kbfgsl", "shampoo", "soap", "tnt", "muon")
LONGEST_PERIOD = 8  # steps of a turn
TURNS = 2
TOO_LONG = 1.0  # mean seconds of a step: a method that needs more is left out from there on
MOMENTS = 8  # bytes a parameter: momentum and Adam's second moment
# (layers, width, batch): one of them grows
CURVES: dict[str, list[tuple[int, int, int]]] = {
    "weights": [(4, width, 128) for width in (158, 500, 1_581, 2_236)],
    "layers": [(layers, 32, 128) for layers in (10, 100, 1_000, 3_000)],
    "batch": [(4, 512, batch) for batch in (16, 64, 256, 1_024, 4_096)],
}
MEMORY_WIDTHS = (158, 500, 1_581, 5_000, 15_811)  # four layers of them have 10^5 to 10^9 weights
COLOURS = ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#555555")  # Okabe and Ito


class Residual(nn.Module):
    """x <- x + W relu(x) / sqrt(layers), so that gradients stay of one size in many layers."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width] to the same shape."""
        for layer in self.layers:
            x = x + layer(functional.relu(x)) / len(self.layers) ** 0.5
        return x


def training(name: str, layers: int, width: int, batch: int) -> Callable[[], object]:
    """One whole step on a fixed batch."""
    torch.manual_seed(0)
    model, inputs, targets = Residual(layers, width), torch.randn(batch, width), torch.arange(batch) % width
    optimizer: Any = (
        torch.optim.AdamW(model.parameters(), lr=RATE, foreach=True)
        if name == "adamw"
        else choose(name).build(model, lr=RATE)
    )

    def closure() -> Any:
        for weight in model.parameters():
            weight.grad = None
        outputs = model(inputs)
        if isinstance(optimizer, minifisher.CurvatureOptimizer):
            optimizer.observe(outputs, likelihood="categorical")
        loss = functional.cross_entropy(outputs, targets)
        loss.backward()
        return loss.detach()

    return lambda: optimizer.step(closure)


def seconds(step: Callable[[], object]) -> float:
    """The mean time of the steps of a period; of fewer where they take too long."""
    spent, began = [], time.perf_counter()
    while len(spent) < LONGEST_PERIOD and time.perf_counter() - began < LONGEST_PERIOD * TOO_LONG:
        started = time.perf_counter()
        step()
        spent.append(time.perf_counter() - started)
    return statistics.mean(spent)


def ratio(name: str, size: tuple[int, int, int]) -> tuple[float | None, float]:
    """The median ratio to AdamW, None where a step takes too long; and AdamW's least milliseconds."""
    base, own = training("adamw", *size), training(name, *size)
    if seconds(own) > TOO_LONG:  # a whole period, in which memory is allocated and kernels are compiled
        return None, 0.0
    rivals = {"adamw": partial(repeat, base, LONGEST_PERIOD), name: partial(repeat, own, LONGEST_PERIOD)}
    table = compare(alternate(rivals, TURNS), "adamw", LONGEST_PERIOD)
    return table[name]["ratio"], table["adamw"]["least_ms"]


def time_curves(methods: Sequence[str]) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    for curve, sizes in CURVES.items():
        rows: dict[str, list[float | None]] = {name: [] for name in methods}
        base: list[float] = []
        for size in sizes:
            least = []
            for name in methods:
                left_out = None in rows[name]
                value, milliseconds = (None, 0.0) if left_out else ratio(name, size)
                rows[name].append(value and round(value, 3))
                least += [milliseconds] if value else []
                print(curve, size, name, rows[name][-1], file=sys.stderr, flush=True)
            base.append(round(min(least), 3))
        curves[curve] = {"sizes": sizes, "adamw_ms": base, "ratios": rows}
    return curves


def state_bytes(name: str, width: int) -> float:
    """Bytes of state a parameter, of four layers that are not there: on the meta device."""
    with torch.device("meta"):
        model = Residual(4, width)
        optimizer = minifisher.METHODS[name](model)
        group = optimizer.param_groups[0]
        tensors: list[torch.Tensor] = []
        for layer in layers_of(model, ()):
            state = optimizer.plan(layer, group).curvature.init(layer)
            tensors += [value for value in state.values() if torch.is_tensor(value)]
    weights = sum(weight.numel() for weight in model.parameters())
    return round(MOMENTS + sum(tensor.nbytes for tensor in tensors) / weights, 2)


def plot(curves: dict[str, Any], path: Path) -> None:
    """A panel a curve: the ratio of every method to AdamW."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    labels = {"weights": "weights", "layers": "layers of 32 x 32", "batch": "samples of a batch"}
    panels = figure.subplots(1, len(curves), sharey=True)
    for axes, (curve, found) in zip(panels, curves.items(), strict=True):
        sizes = [
            {"weights": layers * width**2, "layers": layers, "batch": batch}[curve]
            for layers, width, batch in found["sizes"]
        ]
        for colour, (name, ratios) in zip(COLOURS, found["ratios"].items(), strict=False):
            known = [(x, y) for x, y in zip(sizes, ratios, strict=True) if y]
            width = 2.4 if name == "mbf" else 1.2
            axes.loglog(
                *zip(*known, strict=True), color=colour, label=name, marker="o", markersize=3, linewidth=width
            )
        axes.axhline(1, color="black", linestyle="--", linewidth=0.8)
        axes.set(
            xlabel=labels[curve], yticks=[1, 2, 5, 10, 20, 50], yticklabels=["1", "2", "5", "10", "20", "50"]
        )
        axes.minorticks_off()
    panels[0].set_ylabel("a step's time, AdamW's = 1")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, facecolor="white", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    methods = arguments.methods.split(",")
    curves = time_curves(methods)
    if arguments.plot:
        plot(curves, arguments.plot)
    own = [name for name in methods if name in minifisher.METHODS]
    memory = {name: [state_bytes(name, width) for width in MEMORY_WIDTHS] for name in own}
    report({"time": curves, "state_bytes": {"weights": [4 * w**2 for w in MEMORY_WIDTHS], **memory}})


if __name__ == "__main__":
    main()
