"""A whole training step against AdamW (foreach): in one process, taking turns."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from alternate import CLOCKS, alternate, compare, report
from torch import Tensor, nn
from torch.nn import functional

import minifisher
from minifisher.kernels import choose
from minifisher_lab.problems.autoencoders import LARGE, SMALL, autoencoder
from minifisher_lab.problems.cnns import five_layer, resnet, vgg

RATE = 1e-6  # so small that all networks stay at the start, where they cost the same
WITHOUT_NUMBA = "-without-numba"  # behind an optimizer's name: torch computes what numba would
COMPILED = "-compiled"  # likewise: the network goes through torch.compile
STEPS = 4  # in a turn, or the least common period of statistics and inverses if that is longer


def gpt2() -> nn.Module:
    """The weights of GPT-2 with 12 layers and 124 million parameters, which no batch goes through."""
    width = 768
    blocks = [
        nn.ModuleList(
            [
                *(nn.LayerNorm(width) for _ in range(2)),
                nn.Linear(width, 3 * width),
                nn.Linear(width, width),
                nn.Linear(width, 4 * width),
                nn.Linear(4 * width, width),
            ]
        )
        for _ in range(12)
    ]
    embeddings = nn.Embedding(50_257, width), nn.Embedding(1_024, width)
    return nn.ModuleList([*embeddings, *blocks, nn.LayerNorm(width)])


Network = tuple[Callable[[], nn.Module], tuple[int, ...], bool]  # builder, input shape, classifies
NETWORKS: dict[str, Network] = {
    "autoencoder": (partial(autoencoder, SMALL), (500, 784), False),
    "autoencoder-large": (partial(autoencoder, LARGE), (1000, 784), False),
    "five-layer": (partial(five_layer, 1, 32, 10), (128, 1, 28, 28), True),
    "resnet32": (partial(resnet, 32, 3, 10), (128, 3, 32, 32), True),
    "vgg16": (partial(vgg, 16, 3, 10), (128, 3, 32, 32), True),
    "gpt2": (gpt2, (), True),  # only with --alone
}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda network: torch.optim.AdamW(network.parameters(), lr=RATE, foreach=True),
    "mbf": lambda network: minifisher.MBF(network, lr=RATE),
    "mbf-inputs": lambda network: minifisher.MBF(network, lr=RATE, output_power=0.0),
    "mbf-kernel": lambda network: minifisher.MBF(
        network, lr=RATE, conv_blocks="kernel", statistics_every=1, inverse_every=1
    ),
    "mbf-empirical": lambda network: minifisher.MBF(
        network, lr=RATE, fisher="empirical", statistics_every=10
    ),
}


def training(network: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, classifies: bool) -> Any:
    """One whole step on a fixed batch."""
    targets = torch.arange(len(inputs)) % 10

    def step() -> None:
        optimizer.zero_grad()
        outputs = network(inputs)
        if classifies:
            loss = functional.cross_entropy(outputs, targets)
        else:
            total = functional.binary_cross_entropy_with_logits(outputs, inputs, reduction="sum")
            loss = total / len(inputs)
        loss.backward()
        optimizer.step()

    return step


def optimizer_alone(network: nn.Module, optimizer: torch.optim.Optimizer, *_: object) -> Any:
    """Only the optimizer's step, on fixed gradients."""
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter).mul_(1e-3)
    return optimizer.step


@contextmanager
def numba_for(optimizer: str) -> Iterator[None]:
    """Without numba if the optimizer's name says so."""
    installed = choose.NUMBA_INSTALLED
    choose.NUMBA_INSTALLED = installed and not optimizer.endswith(WITHOUT_NUMBA)
    try:
        yield
    finally:
        choose.NUMBA_INSTALLED = installed


def prepare(optimizer: str, start: nn.Module, make: Any, inputs: Tensor, classifies: bool) -> Any:
    """A step of a copy of the network, after some steps that allocate and compile."""
    network = copy.deepcopy(start)

    def step() -> None:
        with numba_for(optimizer):
            steps()

    with numba_for(optimizer):
        built = OPTIMIZERS[optimizer.removesuffix(WITHOUT_NUMBA).removesuffix(COMPILED)](network)
    steps = make(
        torch.compile(network) if optimizer.endswith(COMPILED) else network, built, inputs, classifies
    )
    for _ in range(2 * (10 if "empirical" in optimizer else STEPS)):
        step()
    return step


def measure(
    name: str, optimizers: list[str], turns: int, clock: str, whole: bool, batch: int | None
) -> dict[str, Any]:
    build, shape, classifies = NETWORKS[name]
    torch.manual_seed(0)
    start, inputs = build(), torch.rand((batch or shape[0], *shape[1:]) if shape else ())
    make = training if whole else optimizer_alone
    rivals = {optimizer: prepare(optimizer, start, make, inputs, classifies) for optimizer in optimizers}
    steps = 20 if any("empirical" in optimizer for optimizer in optimizers) else STEPS
    repeated = {name: partial(repeat, step, steps) for name, step in rivals.items()}
    return compare(alternate(repeated, turns, clock), "adamw", steps)


def repeat(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=["autoencoder", "five-layer"], metavar="NETWORK")
    parser.add_argument(
        "--optimizers",
        default="mbf",
        help=f"of {', '.join(OPTIMIZERS)}, with commas; {WITHOUT_NUMBA} or {COMPILED} may follow a name",
    )
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--batch", type=int, help="samples; default: the network's own number")
    parser.add_argument("--alone", action="store_true", help="the optimizer's step without the network")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if "gpt2" in arguments.networks and not arguments.alone:
        parser.error("gpt2 is its weights without a batch: add --alone")
    torch.set_num_threads(arguments.threads)
    optimizers = ["adamw", *arguments.optimizers.split(",")]
    chosen = arguments.turns, arguments.clock, not arguments.alone, arguments.batch
    report({name: measure(name, optimizers, *chosen) for name in arguments.networks})


if __name__ == "__main__":
    main()
