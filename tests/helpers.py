"""Tiny networks, and dense oracles worked out one sample at a time with plain autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import minifisher
from minifisher.statistics.layers import Layer
from minifisher.step.entries import tensors_of

Loss = Callable[[Tensor, Tensor], Tensor]
Closure = Callable[[], Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples; whatever a sample's output looks like, its entries are the classes."""
    return functional.cross_entropy(outputs.flatten(1), targets)


def closure_of(model: Callable[[Tensor], Tensor], optimizer: Any, inputs: Tensor, targets: Tensor) -> Closure:
    """What `optimizer.step` takes of one batch of a classifier; labels are drawn where that is due."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs = model(inputs)
        optimizer.observe(outputs)
        loss = functional.cross_entropy(outputs, targets)
        loss.backward()
        return loss

    return closure


def train_on_batches(model: nn.Module, optimizer: Any, steps: range) -> None:
    """Steps on batches [8, 5] of three classes; a step always has the same batch and random numbers."""
    for step in steps:
        data = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 5, dtype=torch.float64, generator=data)
        targets = torch.randint(3, (8,), generator=data)
        torch.manual_seed(step)
        optimizer.step(closure_of(model, optimizer, inputs, targets))


@dataclass(frozen=True)
class Problem:
    """A network, one batch, and a loss that is a mean over samples."""

    module: nn.Module
    inputs: Tensor  # [N, ...]
    targets: Tensor  # [N]
    loss: Loss = cross_entropy

    def mean_loss(self) -> Tensor:
        return self.loss(self.module(self.inputs), self.targets)


class Twice(nn.Module):
    """Calls one layer twice in a forward pass."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(inputs)))


class TwoSizes(nn.Module):
    """Calls one convolution on images of two sizes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, images: Tensor) -> Tensor:
        small = functional.avg_pool2d(images, 2)
        return torch.cat((self.layer(images).flatten(2).tanh(), self.layer(small).flatten(2)), dim=2)


class Tied(nn.Module):
    """Two modules, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs)))


@minifisher.register_layer
class OwnLinear(nn.Module):
    """A linear layer with a class of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", inputs, self.weight) + self.bias


class TransposedLinear(nn.Module):
    """A linear layer whose weight is [in, out], as that of GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


minifisher.register_layer(TransposedLinear, transposed=True)


class Attention(nn.Module):
    """A block of a transformer, from the parts that torch provides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return tokens + self.feed_forward(self.norm(tokens))


def _image(*convolution: object, **options: object) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(*convolution, **options), nn.Tanh(), nn.Conv2d(4, 3, 2))


# name -> how to make the network, and the shape of one sample
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (3,)),
    "linear without bias": (lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 3)), (3,)),
    "linear on tokens": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3)),
    "linear on a grid": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (2, 3, 3)),
    "in-place activation": (
        lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
        (3,),
    ),
    "in-place after convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1)),
        (2, 5, 4),
    ),
    "conv2d": (_image(2, 4, 3), (2, 6, 5)),
    "conv2d stride": (_image(2, 4, 3, stride=2), (2, 8, 7)),
    "conv2d unequal": (_image(2, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (2, 6, 5)),
    "conv2d padding": (_image(2, 4, 3, padding=1), (2, 5, 4)),
    "conv2d same": (_image(2, 4, 3, padding="same"), (2, 5, 4)),
    "conv2d same, even kernel": (_image(2, 4, (2, 4), padding="same"), (2, 5, 4)),
    "conv2d valid": (_image(2, 4, 3, padding="valid"), (2, 5, 4)),
    "conv2d reflect": (_image(2, 4, 3, padding=(2, 1), padding_mode="reflect"), (2, 5, 4)),
    "conv2d circular": (_image(2, 4, 3, padding=(1, 2), padding_mode="circular"), (2, 5, 4)),
    "conv2d replicate": (_image(2, 4, 3, padding="same", padding_mode="replicate"), (2, 5, 4)),
    "conv2d dilation": (_image(2, 4, 2, dilation=2, padding=1), (2, 5, 4)),
    "conv2d groups": (_image(4, 4, 3, groups=2, bias=False), (4, 5, 4)),
    "conv2d depthwise": (_image(2, 4, 3, groups=2, padding=1), (2, 5, 4)),
    "conv2d 1x1": (_image(2, 4, 1, bias=False), (2, 3, 4)),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2), nn.Tanh(), nn.Conv1d(4, 2, 2, groups=2)
        ),
        (2, 9),
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 2, padding=(1, 0, 1), stride=(2, 1, 1)), nn.Conv3d(4, 2, 1)),
        (2, 3, 4, 3),
    ),
    "twice": (lambda: Twice(nn.Linear(3, 3)), (3,)),
    "twice on tokens": (lambda: Twice(nn.Linear(3, 3)), (4, 3)),
    "convolution twice": (lambda: Twice(nn.Conv2d(2, 2, 3, padding=1)), (2, 4, 5)),
    "convolution on two sizes": (lambda: TwoSizes(nn.Conv2d(2, 2, 3, padding=1)), (2, 4, 6)),
    "tied": (Tied, (4,)),
    "own linear": (lambda: nn.Sequential(OwnLinear(3, 4), nn.Tanh(), OwnLinear(4, 2)), (5, 3)),
    "transposed": (lambda: nn.Sequential(TransposedLinear(3, 4), nn.Tanh(), TransposedLinear(4, 3)), (3,)),
    "transposed on tokens": (lambda: nn.Sequential(TransposedLinear(3, 4), TransposedLinear(4, 2)), (5, 3)),
    "attention": (lambda: Attention(4), (3, 4)),
}


def problem(name: str, count: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """One of NETS with a random batch of `count` samples."""
    make, shape = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make().to(dtype)
        inputs = torch.randn(count, *shape, dtype=dtype)
        classes = module(inputs[:1].clone()).numel()
        return Problem(module, inputs, torch.randint(classes, (count,)))


Gradients = dict[Tensor, Tensor]  # parameter -> [N, *parameter.shape]


def per_sample_gradients(module: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> Gradients:
    """Brute force: a backward pass a sample, through a copy of the module that nothing is hooked to."""
    twin = copy.deepcopy(module)
    originals, twins = list(module.parameters()), list(twin.parameters())
    rows: list[list[Tensor]] = [[] for _ in twins]
    for n in range(inputs.shape[0]):
        one = loss(twin(inputs[n : n + 1].clone()), targets[n : n + 1])
        for row, gradient in zip(rows, torch.autograd.grad(one, twins), strict=True):
            row.append(gradient)
    return {parameter: torch.stack(row) for parameter, row in zip(originals, rows, strict=True)}


def joined(layer: Layer, of: Gradients) -> Tensor:
    """[N, *layer.shape], worked out without the layer's own `join`."""
    weight = of[layer.weight].mT if layer.transposed else of[layer.weight]
    if layer.bias is None:
        return weight
    return torch.cat((weight.flatten(2), of[layer.bias][:, :, None]), dim=2)


def dense_empirical_fisher(
    layer: Layer, module: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
) -> Tensor:
    """(1/N) sum_n vec(D_n) vec(D_n)^T, [d, d] with d the numbers of `layer.shape`."""
    gradients = joined(layer, per_sample_gradients(module, loss, inputs, targets)).flatten(1)
    return gradients.T @ gradients / len(inputs)


def dense_exact_fisher(layer: Layer, module: nn.Module, likelihood: str, inputs: Tensor) -> Tensor:
    """(1/N) sum_n J_n^T H_n J_n, J_n the Jacobian of the outputs, H_n the likelihood's Fisher matrix."""
    total = inputs.new_zeros(layer.shape.numel(), layer.shape.numel())
    for n in range(inputs.shape[0]):
        outputs = module(inputs[n : n + 1].clone())
        jacobian = _jacobian(outputs, layer)  # [entries, d]
        total += jacobian.T @ _likelihood_fisher(outputs.detach(), likelihood) @ jacobian
    return total / len(inputs)


def _jacobian(outputs: Tensor, layer: Layer) -> Tensor:
    rows = []
    for entry in outputs.flatten():
        gradients = torch.autograd.grad(entry, layer.parameters, retain_graph=True)
        rows.append(joined(layer, {p: g[None] for p, g in zip(layer.parameters, gradients, strict=True)}))
    return torch.cat(rows).flatten(1)


def _likelihood_fisher(outputs: Tensor, likelihood: str) -> Tensor:
    if likelihood == "gaussian":
        return torch.eye(outputs.numel(), dtype=outputs.dtype)
    if likelihood == "bernoulli":
        probability = outputs.flatten().sigmoid()
        return torch.diag(probability * (1 - probability))
    rows = outputs.reshape(-1, outputs.shape[-1]).softmax(-1)
    return torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in rows))


def dense_preconditioner(curvature: object, state: dict[str, Tensor], layer: Layer, damping: float) -> Tensor:
    """The matrix of `precondition`, which is linear, from its values on the unit vectors: [d, d]."""
    size = layer.shape.numel()
    units = torch.eye(size, dtype=next(iter(state.values())).dtype)
    columns = [curvature.precondition(state, unit.reshape(layer.shape), damping).flatten() for unit in units]
    return torch.stack(columns, dim=1)


@dataclass(frozen=True, eq=False)
class Read:
    """The curvature of one layer and its state."""

    layer: Layer
    curvature: Any
    state: dict[str, Tensor]

    def preconditioner(self, damping: float) -> Tensor:
        return dense_preconditioner(self.curvature, self.state, self.layer, damping)


def read_layers(optimizer: Any, kind: type, reading: type[Read]) -> list[Any]:
    """Every layer whose curvature is of this kind."""
    return [
        reading(layer, member.plan.curvature, tensors_of(optimizer.state[layer.weight]))
        for layer, member in optimizer._enrolled.items()
        if isinstance(member.plan.curvature, kind)
    ]


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
