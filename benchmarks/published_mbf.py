"""MBF on the published MNIST autoencoder: the memory view of its authors, and what other blocks do.

The setting is that of the authors' notebook (achrafba96/mbf, demo.ipynb): learning rate 1e-5, damping 3e-4,
statistics every 2 steps and inverses every 25, one pass at the start with labels drawn from the model,
momentum .9 summed, batches of 1000. A run is saved after every epoch. Started again, it goes on from there.

    python benchmarks/published_mbf.py memory-view columns rows --epochs 100
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from alternate import machine
from matplotlib.figure import Figure
from published_autoencoder import PROBLEM, Rival, Run, published
from torch import nn

import minifisher
from minifisher.curvature import Plan
from minifisher.linalg.blocks import BlockReading
from minifisher.methods.mbf import MiniBlocks
from minifisher.statistics.layers import Layer
from minifisher_lab.training import batches
from minifisher_lab.training.published import PUBLISHED

RESULTS = Path(__file__).parent / "results" / "published_mbf"
PRINTED = Path(__file__).parent / "results" / "published_autoencoder"
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of Okabe and Ito


class MemoryViewMBF(minifisher.MBF):
    """MBF with the blocks of its authors' code, which are neither rows nor columns.

    [W b], [out, in + 1], is read in memory, row by row, as in + 1 pieces v of `out` neighbouring entries. The
    layer has one block F = (1 / (in + 1)) sum v v^T, [out, out]. A piece mixes entries of neighbouring rows.
    """

    def plan(self, layer: Layer, options: dict[str, Any]) -> Plan:
        """One block a layer, of width `out`."""
        plan = super().plan(layer, options)
        outputs, columns = layer.shape
        assert isinstance(plan.curvature, MiniBlocks)
        reading = BlockReading(rows=columns, length=outputs, width=outputs)
        curvature = replace(plan.curvature, reading=reading)
        return replace(plan, curvature=curvature, structure="memory view", blocks=1, block_size=outputs)


def _memory_view(module: nn.Module, lr: float) -> MemoryViewMBF:
    row = PUBLISHED["mbf-published"]
    return MemoryViewMBF(module, lr=lr, damping=row.damping, **{**row.options, "linear_blocks": "row"})


VARIANTS = {
    "memory-view": replace(published("mbf-published"), build=partial(_memory_view, lr=1e-5)),
    "columns": published("mbf-published", linear_blocks="column"),
    "rows": published("mbf-published", linear_blocks="row"),
}


def train(name: str, rival: Rival, splits: batches.Splits, epochs: int, saved: Path) -> None:
    """Train so many epochs, or those that are left after the last saved one."""
    checkpoint = saved / f"{name}.pt"
    run = Run(rival, splits, seed=None)
    if checkpoint.exists():
        run.load_state_dict(torch.load(checkpoint, weights_only=True))
    else:
        run.warm_start()
    while run.epoch < epochs and (not run.curve or run.alive):
        run.advance(run.epoch + 1)
        partly = checkpoint.with_suffix(".partly")
        torch.save(run.state_dict(), partly)
        partly.replace(checkpoint)  # whole, also where the process is killed while it writes
        result = {**run.summary(), "curve": run.curve, "machine": machine()}
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def plot(path: Path, epochs: int) -> None:
    """The curves of the results that trained, up to this epoch, beside that of the authors."""
    published = json.loads((PRINTED / "authors.json").read_text())
    defaults = json.loads((PRINTED / "mbf.json").read_text())["mbf"]["curve"]
    curves = {
        "printed by the authors": list(zip(published["epochs"], published["mbf"]["losses"], strict=True)),
        "MBF's defaults, lr 1e-3": _points(defaults),
    }
    for file in sorted(RESULTS.glob("*.json")):
        result = json.loads(file.read_text())
        if isinstance(result["loss"], float) and len(result["curve"]) > 5:  # others diverged
            curves[f"{file.stem.split('_')[0]}, lr {result['lr']:g}"] = _points(result["curve"])
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, points), colour, marker in zip(curves.items(), COLOURS, "os^vD", strict=False):
        shown = [point for point in points if 0 < point[0] <= epochs]
        axes.semilogy(*zip(*shown, strict=True), color=colour, marker=marker, markersize=3.5, label=name)
    axes.set(xlabel="epoch", ylabel="training loss", title="MBF on the MNIST autoencoder")
    axes.grid(color="#dddddd", linewidth=0.6, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, facecolor="white", metadata={"Date": None})


def _points(curve: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(point["epoch"], point["loss"]) for point in curve]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="*", default=list(VARIANTS), help=", ".join(VARIANTS))
    parser.add_argument("--lr", type=float, help="instead of the published one")
    parser.add_argument("--damping", type=float, help="likewise")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--saved", type=Path, default=Path("published_mbf"), help="folder of the checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="train nothing: draw the results into this file")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(arguments.plot, arguments.epochs)
        return
    torch.set_num_threads(arguments.threads)
    arguments.saved.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    splits = batches.load(PROBLEM, torch.device("cpu"))
    for name in arguments.variants:
        published = VARIANTS[name]
        rate, damping = arguments.lr or published.rate, arguments.damping or published.damping
        rival = replace(published, rate=rate, damping=damping)
        suffix = "" if rival == published else f"_{rate:g}_{damping:g}"
        train(name + suffix, rival, splits, arguments.epochs, arguments.saved)


if __name__ == "__main__":
    main()
