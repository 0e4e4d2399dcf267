"""The data of a problem as tensors, ready for the network: images, tables, graphs and texts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch

from minifisher_lab import data

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn

    from minifisher_lab.problems import Problem

HELD_OUT = 100
"""The last part of every work is the test set of a text: one in so many of its characters."""


@dataclass(frozen=True)
class Samples:
    """Inputs [N, ...], images [N, C, H, W], and targets [N, ...]."""

    inputs: Tensor
    targets: Tensor
    mean: Tensor | float = 0.0  # [1, C, 1, 1]: an image in [0, 1] is deviation x input + mean
    deviation: Tensor | float = 1.0

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Samples:
        """The same samples on that device."""
        return Samples(*(torch.as_tensor(part).to(device) for part in vars(self).values()))

    def slice(self, size: int) -> Samples:
        """A fixed random subset; it does not depend on the seed of a run."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:size]
        return Samples(self.inputs[chosen], self.targets[chosen])


@dataclass(frozen=True)
class Graph:
    """What a graph network reads beside the numbers of its nodes."""

    features: Tensor  # [nodes, features]; the sum of a row is 1
    places: Tensor  # [K], where the flattened features are not 0
    adjacency: Tensor  # sparse [nodes, nodes]: D^-1/2 (A + I) D^-1/2

    def to(self, device: torch.device) -> Graph:
        """The same graph on that device."""
        return Graph(self.features.to(device), self.places.to(device), self.adjacency.to(device))


@dataclass(frozen=True)
class Splits:
    """The training and the test set, ready for the network.

    With a validation set, the test figures of a run are those at its best validation accuracy.
    """

    train: Samples
    test: Samples
    validation: Samples | None = None
    graph: Graph | None = None
    """The graph whose node numbers the inputs are."""

    def to(self, device: torch.device) -> Splits:
        """The same splits on that device."""
        validation = self.validation and self.validation.to(device)
        graph = self.graph and self.graph.to(device)
        return Splits(self.train.to(device), self.test.to(device), validation, graph)

    def connect(self, model: nn.Module) -> None:
        """Give the graph to a graph network."""
        if self.graph is not None:
            model.connect(self.graph)  # type: ignore[operator]


def images(problem: Problem) -> Splits:
    """Images in [0, 1]; for a classifier they are standardised per channel."""
    dataset = data.load(str(problem.data))
    return _splits(dataset, dim=(0, 2, 3) if problem.classifies else None)


def table(problem: Problem) -> Splits:
    """Rows whose columns are standardised."""
    return _splits(data.load_table(str(problem.data)), dim=(0,))


def _splits(dataset: data.Dataset | data.Table, dim: tuple[int, ...] | None) -> Splits:
    """Mean 0 and variance 1 over these dimensions of the training set; None: the inputs as they are."""
    train, test = torch.from_numpy(dataset.train_inputs), torch.from_numpy(dataset.test_inputs)
    mean, deviation = torch.zeros(()), torch.ones(())
    if dim is not None:
        deviation, mean = torch.std_mean(train, dim=dim, keepdim=True)
        train, test = (train - mean) / deviation, (test - mean) / deviation
    return Splits(
        Samples(train, torch.from_numpy(dataset.train_targets), mean, deviation),
        Samples(test, torch.from_numpy(dataset.test_targets), mean, deviation),
    )


def citations(problem: Problem) -> Splits:
    """Nodes by their numbers, in Planetoid's public split; every row of features is divided by its sum."""
    graph = data.load_graph(str(problem.data))
    features = torch.from_numpy(graph.features)
    features = features / features.sum(1, keepdim=True).clamp_min(1e-12)  # some nodes have none
    train, validation, test = (
        Samples(torch.from_numpy(nodes), torch.from_numpy(graph.targets[nodes]))
        for nodes in (graph.train, graph.validation, graph.test)
    )
    adjacency = normalised_adjacency(torch.from_numpy(graph.edges), len(features))
    places = features.flatten().nonzero().flatten()
    return Splits(train, test, validation, Graph(features, places, adjacency))


def normalised_adjacency(edges: Tensor, nodes: int) -> Tensor:
    """S = D^-1/2 (A + I) D^-1/2, D the degrees of A + I (Kipf, Welling 2017, section 2.2).

    `edges` [2, E] has each undirected edge once; S is sparse, [nodes, nodes].
    """
    loops = torch.arange(nodes).expand(2, nodes)
    places = torch.cat((edges, edges.flip(0), loops), 1)
    scale = torch.bincount(places[0], minlength=nodes).rsqrt()
    values, shape = scale[places].prod(0), (nodes, nodes)
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=True).coalesce()


def text(problem: Problem) -> Splits:
    """Windows of characters [N, window], targets one character later; every work ends in the test set."""
    works = data.load_text(str(problem.data)).documents
    numbers = {character: number for number, character in enumerate(sorted(set(chain.from_iterable(works))))}
    encoded = [np.fromiter(map(numbers.__getitem__, work), np.int64, len(work)) for work in works]
    train = (work[: len(work) - len(work) // HELD_OUT] for work in encoded)
    test = (work[len(work) - len(work) // HELD_OUT :] for work in encoded)
    return Splits(_windows(train, problem.window), _windows(test, problem.window))


def _windows(works: Iterable[np.ndarray], size: int) -> Samples:
    """The works end to end, cut into windows; a rest that fills none is left out."""
    joined = torch.from_numpy(np.concatenate(list(works)))
    count = (len(joined) - 1) // size
    inputs, targets = (joined[start:][: count * size].view(count, size) for start in (0, 1))
    return Samples(inputs, targets)


LOADERS: dict[str, Callable[[Problem], Splits]] = {
    "images": images,
    "table": table,
    "graph": citations,
    "text": text,
}
"""The kinds of data, and what makes tensors of each."""
