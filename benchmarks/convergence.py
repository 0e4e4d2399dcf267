"""The linear rate of MBF on an over-parameterised two-layer network, against the rate that theory predicts.

f(x) = (1 / sqrt m) sum_r a_r relu(w_r . x) with fixed signs a_r, half the mean squared error, the full batch,
and the exact Fisher matrix with one block for each neuron. docs/convergence.md derives the prediction.

    python benchmarks/convergence.py --plot docs/images/convergence.svg
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import minifisher

DAMPING_OF_WIDTH_ONE = 1e-6  # times 1/m, as the Fisher matrix of a neuron is
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of Okabe and Ito: told apart by everybody
SOLVED = 1e-20  # of the first loss: rounding errors are next


class TwoLayers(nn.Module):
    """f(x) = (1 / sqrt m) sum_r a_r relu(w_r . x), [n, 1] of x [n, d]; only W [m, d] is trained."""

    def __init__(self, inputs: int, width: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Linear(inputs, width, bias=False, dtype=torch.float64)
        nn.init.normal_(self.first.weight, generator=generator)
        signs = torch.randint(2, (width, 1), generator=generator).double() * 2 - 1
        self.register_buffer("output", signs / math.sqrt(width))

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs."""
        hidden: Tensor = self.first(inputs)
        return hidden.relu() @ self.output


@dataclass(frozen=True)
class Curve:
    """The losses of one optimizer, and the factor of the loss a step: predicted, and fitted."""

    losses: list[float]
    predicted: float

    @property
    def fitted(self) -> float:
        """exp of the slope of log loss, by least squares over the second half of the steps."""
        logs = torch.tensor(self.losses, dtype=torch.float64).log()[len(self.losses) // 2 :]
        steps = torch.arange(len(logs), dtype=torch.float64)
        steps = steps - steps.mean()
        return float(((steps * logs).sum() / steps.square().sum()).exp())

    def steps_to(self, fraction: float) -> int | None:
        """The first step at which the loss is below this fraction of the first loss."""
        return next((n for n, loss in enumerate(self.losses) if loss <= fraction * self.losses[0]), None)


def data(samples: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit inputs [n, d] with a spectrum that falls from 1 to 0.1, and random targets [n, 1]."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(samples, inputs + 1, dtype=torch.float64, generator=generator)
    scaled = normal[:, :-1] * torch.logspace(0, -1, inputs, dtype=torch.float64)
    return nn.functional.normalize(scaled), normal[:, -1:]


def jacobians(network: TwoLayers, inputs: Tensor) -> Tensor:
    """J_r = d f / d w_r for every neuron, [m, n, d]: a_r / sqrt m 1[w_r . x_i > 0] x_i."""
    active = (network.first(inputs) > 0).detach().T  # [m, n]
    return (active * network.output)[..., None] * inputs


def mbf_operator(network: TwoLayers, inputs: Tensor, damping: float) -> Tensor:
    """G = sum_r J_r (J_r^T J_r + n lambda I)^-1 J_r^T, [n, n]: a step multiplies the residual by I - lr G."""
    total = torch.zeros(len(inputs), len(inputs), dtype=torch.float64)
    for block in jacobians(network, inputs):
        matrix = block.T @ block + len(inputs) * damping * torch.eye(inputs.shape[1], dtype=torch.float64)
        total += block @ torch.linalg.solve(matrix, block.T)
    return total


def gradient_operator(network: TwoLayers, inputs: Tensor) -> Tensor:
    """K / n = (1/n) sum_r J_r J_r^T, [n, n]: gradient descent multiplies the residual by I - lr K / n."""
    return (jacobians(network, inputs) @ jacobians(network, inputs).mT).sum(0) / len(inputs)


def best_rate(operator: Tensor) -> tuple[float, float]:
    """lr = 1 / largest eigenvalue, and the predicted factor of the loss, (1 - lr smallest eigenvalue)^2."""
    values = torch.linalg.eigvalsh(operator)
    rate = 1 / float(values[-1])
    return rate, (1 - rate * float(values[0])) ** 2


def mbf(network: TwoLayers, rate: float, damping: float) -> Any:
    """The theorem's method: one block a neuron, of this batch alone, neither momentum nor graft."""
    return minifisher.MBF(
        network,
        lr=rate,
        momentum=0.0,
        curvature_decay=0.0,
        damping=damping,
        relative_damping=False,
        graft=None,
        fisher="exact",
        share="row",
        block_size=network.first.in_features,
        statistics_every=1,
        inverse_every=1,
    )


def train(network: TwoLayers, optimizer: Any, inputs: Tensor, targets: Tensor, steps: int) -> list[float]:
    """The losses before each step, until the last or until nothing is left to learn."""
    losses: list[float] = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        outputs = network(inputs)
        if isinstance(optimizer, minifisher.CurvatureOptimizer):
            optimizer.observe(outputs, "gaussian")
        loss = 0.5 * (outputs - targets).square().mean()
        losses.append(loss.item())
        if losses[-1] < SOLVED * losses[0]:
            break
        loss.backward()
        optimizer.step()
    return losses


def curves(width: int, samples: int, inputs: int, steps: int) -> dict[str, Curve]:
    """MBF and gradient descent from the same start, each at its own best constant rate."""
    x, y = data(samples, inputs)
    damping = DAMPING_OF_WIDTH_ONE / width
    operators: dict[str, Callable[[TwoLayers], Tensor]] = {
        "MBF": lambda network: mbf_operator(network, x, damping),
        "gradient descent": lambda network: gradient_operator(network, x),
    }
    found = {}
    for name, operator in operators.items():
        network = TwoLayers(inputs, width)
        rate, predicted = best_rate(operator(network))
        optimizer = (
            mbf(network, rate, damping) if name == "MBF" else torch.optim.SGD(network.parameters(), lr=rate)
        )
        found[name] = Curve(train(network, optimizer, x, y, steps), predicted)
    return found


def table(results: dict[int, dict[str, Curve]]) -> str:
    """Markdown: factors of the loss a step, and the steps to a millionth of the first loss."""
    rows = ["| width | method | predicted factor | fitted | steps to 1e-6 |", "|---|---|---|---|---|"]
    for width, found in results.items():
        for name, curve in found.items():
            steps = curve.steps_to(1e-6) or f"over {len(curve.losses) - 1:,}"
            rows.append(f"| {width} | {name} | {curve.predicted:.5f} | {curve.fitted:.5f} | {steps} |")
    return "\n".join(rows)


def plot(results: dict[int, dict[str, Curve]], path: Path) -> None:
    """One panel a method, on a logarithmic axis: the losses, and dashed the predicted ones."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    methods = list(next(iter(results.values())))
    for axes, method in zip(figure.subplots(1, len(methods)), methods, strict=True):
        for colour, (width, found) in zip(COLOURS, results.items(), strict=False):
            curve = found[method]
            relative = [loss / curve.losses[0] for loss in curve.losses]
            axes.semilogy(relative, color=colour, label=f"width {width:,}")
            predicted = [curve.predicted**step for step in range(len(relative))]
            axes.semilogy(predicted, color=colour, linestyle="--", linewidth=0.9)
        axes.set(title=method, xlabel="step", ylim=(SOLVED, 2))
        axes.legend(frameon=False)
        axes.grid(color="#dddddd", linewidth=0.6)
    figure.axes[0].set_ylabel("loss / first loss (dashed: predicted)")
    figure.savefig(path, facecolor="white", metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--inputs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    chosen = parser.parse_args(arguments)
    results = {width: curves(width, chosen.samples, chosen.inputs, chosen.steps) for width in chosen.widths}
    print(table(results))
    if chosen.plot:
        plot(results, chosen.plot)


if __name__ == "__main__":
    main()
