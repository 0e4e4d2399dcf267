"""Deep autoencoders with ReLU; code and output are linear, and the decoder mirrors the encoder."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

from torch import nn

from minifisher_lab.problems.problem import Problem


def autoencoder(widths: tuple[int, ...]) -> nn.Sequential:
    """Fully connected layers widths[0]-...-widths[-1]-...-widths[0]; no ReLU at the code and the output."""
    layers: list[nn.Module] = [nn.Flatten()]
    for half in (widths, widths[::-1]):
        for inputs, outputs in pairwise(half):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        layers.pop()
    return nn.Sequential(*layers)


def _problem(name: str, data: str, widths: tuple[int, ...], batch_size: int, epochs: int) -> Problem:
    shape = "-".join(map(str, widths))
    gaussian = data == "faces"
    return Problem(
        name=name,
        description=f"{shape} mirrored, {'squared error' if gaussian else 'cross entropy'}",
        data=data,
        architecture=partial(autoencoder, widths),
        likelihood="gaussian" if gaussian else "bernoulli",
        batch_size=batch_size,
        epochs=epochs,
    )


LARGE = (784, 1000, 500, 250, 30)
SMALL = (784, 500, 250, 30)

# Widths, batch 1000 and losses: Goldfarb, Ren, Bahamou 2020 (arXiv 2006.08877), published code.
AUTOENCODERS = (
    _problem("autoencoder-digits", "digits", (64, 400, 200, 50, 10), batch_size=100, epochs=50),
    _problem("autoencoder-mnist", "mnist", LARGE, batch_size=1000, epochs=50),
    _problem("autoencoder-mnist-small", "mnist", SMALL, batch_size=500, epochs=10),
    _problem("autoencoder-fashion", "fashion-mnist", SMALL, batch_size=500, epochs=10),
    _problem("autoencoder-faces", "faces", (625, 2000, 1000, 500, 30), batch_size=1000, epochs=50),
    _problem("autoencoder-curves", "curves", (784, 400, 200, 100, 50, 25, 6), batch_size=1000, epochs=100),
    _problem("autoencoder-curves-small", "curves", (784, 200, 100, 50, 25, 6), batch_size=200, epochs=10),
)
