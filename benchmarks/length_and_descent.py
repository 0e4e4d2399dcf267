"""How long a preconditioned step should be: what docs/why.md says about length and descent. Prints JSON.

    python benchmarks/length_and_descent.py > benchmarks/results/length_and_descent.json

This takes some ten minutes on one thread. With `--results` and that file, and `--plot docs/images`, it draws
what was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from minifisher_lab.problems import PROBLEMS
from minifisher_lab.training import batches
from minifisher_lab.training.optimizers import choose
from minifisher_lab.training.train import Trainer, evaluate

STEPS = {"mlp-tabular": 200, "cnn-digits": 200, "autoencoder-digits": 300, "vit-digits": 300}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
PLAIN = ":nesterov=False:damping=0.1"  # P M, as docs/why.md derives it
OPTIMIZERS = {"adamw": "AdamW", "mbf:length=norm": "MBF, equal length", "mbf": "MBF, equal descent (default)"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # of Okabe and Ito
STYLES = ("-", "--", "-.", ":", "-", "--")
MARKERS = ("o", "s", "^")
ADAM_DECAY, ADAM_EPSILON = 0.999, 1e-8

# ---- a quadratic of two weights ----

CURVATURES = (1.0, 20.0)
ANGLE = -15.0  # in degrees, of the axis of the smaller curvature
POINT = (4.0, 0.5)  # along the axes of the two curvatures
DAMPING, RATE = 0.5, 0.5


def quadratic() -> tuple[Tensor, Tensor]:
    """H [2, 2] and the point w [2] at which the steps begin."""
    angle = math.radians(ANGLE)
    cos, sin = math.cos(angle), math.sin(angle)
    axes = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    curvatures, point = (torch.tensor(pair, dtype=torch.float64) for pair in (CURVATURES, POINT))
    return axes * curvatures @ axes.T, axes @ point


def directions() -> dict[str, Tensor]:
    """M, Adam's step s and P M at a point of 1/2 w^T H w, as first steps have them; each is subtracted.

    M = H w, s = lr M / |M| in every entry, P = (H + lambda I)^-1. P M once has the length of s, and once the
    factor <M, s> / <M, P M>.
    """
    hessian, point = quadratic()
    momentum = hessian @ point
    step = RATE * momentum.sign()
    direction = torch.linalg.solve(hessian + DAMPING * torch.eye(2, dtype=torch.float64), momentum)
    return {
        "M": momentum * step.norm() / momentum.norm(),
        "s": step,
        "equal length": direction * step.norm() / direction.norm(),
        "equal descent": direction * (momentum @ step) / (momentum @ direction),
    }


# ---- a network: cosines of every row ----


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """The cosine between equal rows of two tensors, [rows]; what is behind the first axis is a row."""
    return torch.nn.functional.cosine_similarity(one.flatten(1), other.flatten(1), eps=1e-30)


def adam_step(state: dict[str, Any], steps: int) -> Tensor:
    """Adam's step but for a factor, M / (sqrt(V / (1 - beta_2^t)) + epsilon), shaped as the weight."""
    second = state["second_moment"] / (1 - ADAM_DECAY**steps)
    step: Tensor = state["momentum"] / (second.sqrt() + ADAM_EPSILON)
    return step


def rows_of_a_step(trainer: Trainer, spent: float, steps: int, limit: float) -> dict[str, dict[str, float]]:
    """Take a step. For every matrix: medians over its rows, and the shares that are limited or that ascend.

    Without weight decay the change of a row has the direction of P M, whatever its length is.
    """
    matrices = {name: w for name, w in trainer.model.named_parameters() if w.ndim > 1}
    before = {name: weight.detach().clone() for name, weight in matrices.items()}
    trainer.step(spent)
    found = {}
    for name, weight in matrices.items():
        state = trainer.optimizer.state[weight]
        of_adam = cosines(state["momentum"], adam_step(state, steps))
        of_mbf = cosines(state["momentum"], before[name] - weight.detach())
        ascends = of_mbf <= 0  # the length of Adam's step then
        factor = (of_adam / of_mbf).masked_fill(ascends, 1)
        shape = " x ".join(map(str, weight.shape))
        found[f"{name.removesuffix('.weight')}: {shape}"] = {
            "cosine of s": round(float(of_adam.median()), 4),
            "cosine of P M": round(float(of_mbf.median()), 4),
            "factor": round(float(factor.median()), 3),
            "limited": round(float((factor > limit).double().mean()), 3),
            "ascending": round(float(ascends.double().mean()), 3),
        }
    return found


def cosines_over_training(problem: str, rate: float, steps: int, every: int) -> dict[str, Any]:
    """`rows_of_a_step` for every so many steps of a run of MBF with plain momentum."""
    splits = batches.load(PROBLEMS[problem], torch.device("cpu"))
    trainer = Trainer(PROBLEMS[problem], splits, choose("mbf" + PLAIN), rate, seed=0)
    limit = trainer.optimizer.param_groups[0]["length_limit"]
    at = []
    for step in range(steps):
        if step % every:
            trainer.step(step / steps)
        else:
            layers = rows_of_a_step(trainer, step / steps, step + 1, limit)
            at.append({"step": step + 1, "layers": layers})
    return {"problem": problem, "lr": rate, "limit": limit, "at": at}


# ---- networks: the loss after equal steps ----


def final_loss(problem: str, splits: batches.Splits, spec: str, rate: float, seed: int, steps: int) -> float:
    """The loss of the training set, at most 5,000 samples of it, after the last step."""
    choice = choose(spec + PLAIN if spec.startswith("mbf") else spec)
    trainer = Trainer(PROBLEMS[problem], splits, choice, rate, seed)
    for step in range(steps):
        trainer.step(spent=step / steps)
    loss, _ = evaluate(PROBLEMS[problem], trainer.model, splits.train.slice(5000))
    return loss


def losses(problem: str, rates: Sequence[float], seeds: int, steps: int) -> dict[str, Any]:
    """Mean and standard deviation over seeds, for every optimizer one of each rate."""
    splits = batches.load(PROBLEMS[problem], torch.device("cpu"))
    table: dict[str, Any] = {"steps": steps}
    for spec in OPTIMIZERS:
        table[spec] = {"mean": [], "deviation": []}
        for rate in rates:
            found = [final_loss(problem, splits, spec, rate, seed, steps) for seed in range(seeds)]
            deviation = statistics.stdev(found) if seeds > 1 else 0.0
            table[spec]["mean"].append(float(f"{statistics.mean(found):.4g}"))
            table[spec]["deviation"].append(float(f"{deviation:.2g}"))
            print(problem, spec, rate, table[spec]["mean"][-1], file=sys.stderr, flush=True)
    return table


# ---- pictures ----


def figure_of(width: float, height: float) -> Figure:
    """A white figure: it is read on light and on dark pages."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def draw_directions(path: Path) -> None:
    """Level lines, and the four steps from one point; on the dashed line all promise what s does."""
    figure = figure_of(6.8, 4.0)
    axes = figure.subplots()
    hessian, point = quadratic()
    found = directions()
    _draw_levels(axes, hessian)
    labels = {
        "M": "$-M$, cut to the length of $s$",
        "s": "$-s$, the step of Adam",
        "equal descent": r"$-PM\,\langle M,s\rangle/\langle M,PM\rangle$: equal descent",
        "equal length": r"$-PM\,|s|/|PM|$: equal length",
    }
    for colour, (name, label) in zip(
        ("#555555", COLOURS[0], COLOURS[2], COLOURS[1]), labels.items(), strict=True
    ):
        # The shorter of the two along P M lies on the longer one.
        style = {"color": colour, "label": label, "width": 0.011 if name == "equal length" else 0.006}
        axes.quiver(*point, *-found[name], angles="xy", scale_units="xy", scale=1, zorder=3, **style)
    tip, normal = point - found["s"], found["M"] / found["M"].norm()
    along = torch.stack([-normal[1], normal[0]])
    ends = torch.stack([tip - 4 * along, tip + 4 * along])
    label = "steps that promise the decrease of $s$"
    axes.plot(ends[:, 0], ends[:, 1], color="black", linestyle="--", linewidth=1, label=label)
    axes.plot(0, 0, marker="*", markersize=11, color="black", linestyle="none", label="the minimum")
    axes.set(
        xlim=(-1.6, 5.2), ylim=(-1.8, 1.9), aspect="equal", xlabel="first weight", ylabel="second weight"
    )
    axes.legend(frameon=True, fontsize=8, loc="upper left")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_levels(axes: Axes, hessian: Tensor) -> None:
    sides = (torch.linspace(-1.6, 5.2, 200).double(), torch.linspace(-1.8, 1.9, 200).double())
    grid = torch.stack(torch.meshgrid(*sides, indexing="xy"), -1)
    height = 0.5 * (grid @ hessian * grid).sum(-1)
    levels = [0.2, 0.8, 1.8, 3.2, 5, 7.2, 9.8, 12.8]
    axes.contour(grid[..., 0], grid[..., 1], height, levels, colors="#aaaaaa", linewidths=0.8)


def draw_cosines(result: dict[str, Any], path: Path) -> None:
    """One panel each for cos(M, s), cos(M, P M) and their ratio; one line a layer."""
    figure = figure_of(10.5, 3.2)
    limit = result["limit"]
    panels = {"cosine of s": "cos(M, s)", "cosine of P M": "cos(M, P M)", "factor": "cos(M, s) / cos(M, P M)"}
    steps = [point["step"] for point in result["at"]]
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for index, layer in enumerate(result["at"][0]["layers"]):
            values = [point["layers"][layer][key] for point in result["at"]]
            axes.plot(steps, values, label=layer, color=COLOURS[index], linestyle=STYLES[index])
        axes.set(title=title, xlabel="step", ylim=(0, limit + 0.5) if key == "factor" else (0, 1))
        axes.grid(color="#dddddd", linewidth=0.6)
    axes.axhline(limit, color="black", linewidth=1)
    axes.text(steps[-1], limit + 0.07, "the limit", ha="right", fontsize=8)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, title="layer", loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_losses(rates: Sequence[float], tables: dict[str, dict[str, Any]], path: Path) -> None:
    """One panel a problem: the final training loss over the learning rate, with bars of one deviation."""
    figure = figure_of(3.1 * len(tables), 3.4)
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, (problem, table) in zip(panels, tables.items(), strict=True):
        for index, (spec, label) in enumerate(OPTIMIZERS.items()):
            mean, deviation = (torch.tensor(table[spec][key]) for key in ("mean", "deviation"))
            below = torch.minimum(deviation, 0.9 * mean)  # a logarithmic axis has no zero
            style = {"color": COLOURS[index], "linestyle": STYLES[index], "marker": MARKERS[index]}
            axes.errorbar(rates, mean, (below, deviation), label=label, capsize=2, markersize=4, **style)
        axes.set(title=problem, xlabel="learning rate", xscale="log", yscale="log")
        axes.grid(color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("final training loss")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw(result: dict[str, Any], folder: Path, kinds: Sequence[str] = ("svg",)) -> None:
    """All three pictures into the folder."""
    for kind in kinds:
        draw_directions(folder / f"why_directions.{kind}")
        draw_cosines(result["cosines"], folder / f"why_cosines.{kind}")
        draw_losses(result["rates"], result["losses"], folder / f"why_losses.{kind}")


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Everything that the pictures show of networks."""
    steps = {problem: chosen.steps or STEPS[problem] for problem in (*chosen.problems, chosen.cosines_of)}
    of_layers = cosines_over_training(chosen.cosines_of, 3e-3, steps[chosen.cosines_of], chosen.every)
    tables = {
        problem: losses(problem, chosen.rates, chosen.seeds, steps[problem]) for problem in chosen.problems
    }
    return {"rates": list(chosen.rates), "seeds": chosen.seeds, "cosines": of_layers, "losses": tables}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--cosines-of", choices=STEPS, default="cnn-digits")
    parser.add_argument("--every", type=int, default=4, help="steps between two cosines")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of all problems, instead of each one's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="draw this file's numbers, and measure nothing")
    parser.add_argument("--plot", type=Path, help="draw into this folder")
    parser.add_argument("--kinds", nargs="+", default=["svg"], help="kinds of pictures: svg, png")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    result = json.loads(chosen.results.read_text()) if chosen.results else measure(chosen)
    if not chosen.results:
        print(json.dumps(result, indent=1))
    if chosen.plot:
        draw(result, chosen.plot, chosen.kinds)


if __name__ == "__main__":
    main()
